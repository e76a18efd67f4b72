from __future__ import annotations

import json

import pytest

from mmicl_core.config.run import RunConfig, load_run
from pipelines.arguments import RECIPES

ALL = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
def test_recipe_round_trips_through_json(recipe):
    run = load_run(recipe)
    assert RunConfig.model_validate(json.loads(json.dumps(run.model_dump(mode="json")))) == run


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
def test_recipe_opens_with_its_command(recipe):
    comment = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("mmicl " in line for line in comment), "say in its header how it is run"

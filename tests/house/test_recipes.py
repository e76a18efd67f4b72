from __future__ import annotations

import json

import pytest
import yaml

from mmicl_core.assets import EMBEDDED, resolve
from mmicl_core.backbones.hugging_face import outline_backbone
from mmicl_core.config.model import BackboneConfig
from mmicl_core.config.run import RunConfig, load_run
from mmicl_core.methods import build_method
from pipelines.arguments import RECIPES
from pipelines.trainings import trainings_of

ALL = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
def test_recipe_round_trips_through_json(recipe):
    run = load_run(recipe)
    assert RunConfig.model_validate(json.loads(json.dumps(run.model_dump(mode="json")))) == run


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
def test_recipe_opens_with_its_command(recipe):
    comment = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("mmicl " in line for line in comment), "say in its header how it is run"


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
def test_recipe_states_only_what_differs_from_the_defaults(recipe):
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    defaults = load_run(None, {"method": {"type": given.get("method", {}).get("type", "aim")}})
    for section, settings in given.items():
        default = getattr(defaults, section)
        # A section that is none by default has nothing to repeat.
        plain = default.model_dump(mode="json") if default is not None else {}
        repeated = [name for name, value in settings.items() if name in plain and value == plain[name]]
        repeated = [name for name in repeated if name != "type"]
        assert repeated == [], f"{section}: defaults already say this"


@pytest.mark.parametrize("recipe", ALL, ids=lambda path: path.stem)
def test_models_that_a_recipe_asks_can_be_trained_and_no_two_of_them_are_the_same(recipe):
    trainings = [run for model in load_run(recipe).evaluate.models for run in trainings_of(model)]
    assert all(run not in trainings[:place] for place, run in enumerate(trainings))
    assert all(run.corpus.path.startswith(EMBEDDED) for run in trainings), "another one has to be made first"
    methods = {run.method.model_dump_json(): run.method for run in trainings}
    for method in methods.values():
        # All of them are around nano, and one that is new is as large.
        assert build_method(outline_backbone(resolve(BackboneConfig().path)), method).trainable()

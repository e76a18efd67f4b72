"""Random recipes and flags: each is a run or one sentence for every mistake, never a traceback.

make trials
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmicl_core.config.run import RunConfig, load_run
from mmicl_core.errors import ConfigError
from pipelines.settings import parse_run

ROUNDS = 5000
VALUES = (
    0,
    1,
    -1,
    3,
    2.5,
    1e300,
    float("nan"),
    True,
    None,
    "",
    "x",
    "null",
    "[1,",
    "{",
    [],
    [1],
    {},
    {"a": 1},
)
SECTIONS = {
    name: list(getattr(field.annotation, "model_fields", {"type": 0, "layer_norm": 0, "temperature": 0}))
    for name, field in RunConfig.model_fields.items()
}


def random_sections(chance: random.Random) -> Any:
    if chance.random() < 0.05:
        return chance.choice(VALUES)
    sections: dict[str, Any] = {}
    for name in chance.sample([*SECTIONS, "other"], chance.randint(0, 3)):
        keys = [*SECTIONS.get(name, []), "other"]
        settings = {
            key: chance.choice(VALUES) for key in chance.sample(keys, chance.randint(0, min(3, len(keys))))
        }
        sections[name] = settings if chance.random() < 0.9 else chance.choice(VALUES)
    return sections


def random_flags(chance: random.Random) -> list[str]:
    flags = []
    for _ in range(chance.randint(0, 3)):
        name = chance.choice(list(SECTIONS))
        flags.append(f"--{name}.{chance.choice([*SECTIONS[name], 'other'])}")
        if chance.random() < 0.9:
            flags.append(str(chance.choice(VALUES)))
    return flags


@pytest.mark.trial
@pytest.mark.parametrize("seed", range(4))
def test_random_settings_are_a_run_or_sentences(tmp_path: Path, seed: int):
    chance, runs = random.Random(seed), 0
    for number in range(ROUNDS):
        recipe = tmp_path / "run.yaml"
        recipe.write_text(yaml.safe_dump(random_sections(chance)), encoding="utf-8")
        try:
            load_run(recipe)
            runs += 1
            if number % 20 == 0:
                parse_run("train", "", ["--recipe", str(recipe), *random_flags(chance)])
        except ConfigError as error:
            assert str(error)
    assert 0 < runs < ROUNDS

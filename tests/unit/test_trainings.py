from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.evaluate import AskedModel
from mmicl_core.config.model import AimConfig
from mmicl_core.config.run import load_run
from mmicl_core.errors import ConfigError
from pipelines.arguments import find_recipe
from pipelines.trainings import trainings_of


def model(**settings: Any) -> AskedModel:
    return AskedModel(name="mine", **settings)


@pytest.fixture
def tower(tmp_path: Path) -> str:
    path = tmp_path / "tower.yaml"
    path.write_text("backbone: {path: 'new:nano', vision_tower: 'embedded:nano'}\n", encoding="utf-8")
    return str(path)


def test_model_without_a_recipe_takes_no_training() -> None:
    assert trainings_of(model()) == trainings_of(model(adapter="folder")) == ()


def test_recipe_is_trained_as_it_is_where_nothing_is_set_otherwise() -> None:
    assert trainings_of(model(recipe="lora_nano")) == (load_run(find_recipe("lora_nano")),)


def test_each_seed_is_a_training_of_its_own_episodes_and_of_everything_else_alike() -> None:
    settings = {"train.steps": 7, "method.layer": None, "method.text": "answer"}
    one, other = trainings_of(model(recipe="nano_4_aim", settings=settings, train_seeds=(3, 5)))
    assert (one.train.seed, one.episodes.seed, other.train.seed, other.episodes.seed) == (3, 3, 5, 5)
    assert one.train.steps == 7 and one.method == AimConfig(text="answer")
    again = one.train.model_copy(update={"seed": 5}), one.episodes.model_copy(update={"seed": 5})
    assert other == one.model_copy(update={"train": again[0], "episodes": again[1]})


def test_other_backbone_keeps_its_own_tower(tower: str) -> None:
    (as_it_is,) = trainings_of(model(recipe=tower))
    assert as_it_is.backbone.vision_tower == "embedded:nano"
    (other,) = trainings_of(model(recipe=tower, backbone="runs/other"))
    assert (other.backbone.path, other.backbone.vision_tower) == ("runs/other", None)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"recipe": "nowhere"}, "recipe nowhere does not exist; these come along: .*lora_nano"),
        (
            {"settings": {"train.stepz": 1}},
            r"lora_nano\.yaml with its settings: train\.stepz is not a setting",
        ),
        ({"settings": {"method.layer": 1}}, r"method\.lora\.layer is not a setting"),
        ({"settings": {"training.steps": 1}}, "training is not a setting"),
        ({"settings": {"train.steps": "many"}}, r"train\.steps: .*integer.*\(found 'many'\)"),
        ({"settings": {"steps": 1}}, "steps is no setting of a training: write SECTION.SETTING"),
        ({"settings": {"evaluate.queries": 1}}, "evaluate.queries is no setting of a training"),
        (
            {"settings": {"train.seed": 1}, "train_seeds": (0,)},
            "train.seed is set by train_seeds or backbone",
        ),
        ({"settings": {"backbone.path": "a"}, "backbone": "b"}, "backbone.path is set by train_seeds or"),
        ({"recipe": "nano_1_vision"}, "trains a vision tower .method supcon., which answers nothing"),
        ({"raw": 2}, "raw is 2, .* method 'lora' fuses none: set raw to 0"),
    ],
)
def test_mistake_names_the_model(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^evaluate.models: 'mine': .*{told}"):
        trainings_of(model(**{"recipe": "lora_nano", **settings}))


def test_each_of_several_mistakes_names_the_model() -> None:
    settings = {"train.steps": 0, "train.log_every": 0}
    with pytest.raises(ConfigError) as caught:
        trainings_of(model(recipe="lora_nano", settings=settings))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and all(line.startswith("evaluate.models: 'mine': ") for line in lines)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from mmicl_core.config.model import AimConfig, LclConfig
from mmicl_core.config.run import RunConfig, load_run, nested
from mmicl_core.errors import ConfigError


def write(tmp_path, text: str):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_recipe_states_what_differs_and_defaults_fill_the_rest(tmp_path):
    run = load_run(write(tmp_path, "train:\n  steps: 7\n"))
    assert run.train.steps == 7
    assert run.train.global_batch == RunConfig().train.global_batch
    assert run.serve == RunConfig().serve


def test_empty_recipe_is_the_default_run(tmp_path):
    assert load_run(write(tmp_path, "")) == load_run() == RunConfig()


def test_override_wins_over_the_recipe_and_leaves_its_neighbours(tmp_path):
    recipe = write(tmp_path, "train:\n  steps: 7\n  seed: 3\n")
    run = load_run(recipe, {"train": {"steps": 9}})
    assert (run.train.steps, run.train.seed) == (9, 3)


def test_method_without_a_type_is_the_default_method(tmp_path):
    run = load_run(write(tmp_path, "method:\n  layer_norm: false\n"))
    assert run.method == AimConfig(layer_norm=False)


def test_method_is_chosen_by_its_type(tmp_path):
    assert load_run(write(tmp_path, "method:\n  type: lcl\n")).method == LclConfig()


def test_setting_of_another_method_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"method\.lcl\.layer_norm is not a setting"):
        load_run(write(tmp_path, "method:\n  type: lcl\n  layer_norm: false\n"))


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist: name"):
        load_run(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["train: [", "a: b: c", "\tx: 1"])
def test_recipe_that_is_not_yaml_is_one_sentence(tmp_path, text):
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        load_run(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_recipe_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"train:\n  steps: \xff\xfe\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_run(path)


@pytest.mark.parametrize(("text", "kind"), [("- train", "list"), ("train", "str"), ("3", "int")])
def test_recipe_that_is_not_sections_says_what_it_is(tmp_path, text, kind):
    with pytest.raises(ConfigError, match=f"holds a {kind}"):
        load_run(write(tmp_path, text))


def test_mistake_in_an_override_names_the_command_line(tmp_path):
    recipe = write(tmp_path, "train:\n  steps: 7\n")
    with pytest.raises(ConfigError, match=r"run\.yaml with the command line: train\.steps"):
        load_run(recipe, {"train": {"steps": "x"}})
    with pytest.raises(ConfigError, match=r"^the command line: train\.steps"):
        load_run(None, {"train": {"steps": "x"}})


def test_settings_by_name_become_those_of_a_recipe_and_leave_their_neighbours(tmp_path):
    named = {"train.steps": 9, "train.zero.stage": 2, "episodes.stages": [{"episodes": 3}]}
    recipe = write(tmp_path, "train:\n  seed: 3\n  zero: {nvme_path: here}\n")
    run = load_run(recipe, nested(named), "its settings")
    assert (run.train.steps, run.train.seed) == (9, 3)
    assert (run.train.zero.stage, run.train.zero.nvme_path) == (2, "here")
    assert [stage.episodes for stage in run.episodes.stages] == [3]
    with pytest.raises(ConfigError, match=r"run\.yaml with its settings: train\.zero\.stag is not a setting"):
        load_run(recipe, nested({"train.zero.stag": 2}), "its settings")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"train": {"global_batch": 1}}, r"global_batch \(1\) must be at least num_workers \(2\)"),
        ({"train": {"num_workers": {"min": 3, "max": 2}}}, r"min \(3\) is above max \(2\)"),
        ({"train": {"num_workers": 0}}, "at least 1 worker has to train, not 0"),
        (
            {"train": {"zero": {"stage": 0, "offload_optimizer": "cpu"}}},
            "'cpu' needs stage 1, but stage is 0",
        ),
        ({"train": {"zero": {"stage": 2, "offload_parameters": "cpu"}}}, "needs stage 3, but stage is 2"),
        ({"train": {"zero": {"offload_optimizer": "nvme"}}}, "nvme_path is None: name a folder"),
        ({"train": {"validation": {"part": "train"}}}, "'train', which is trained on"),
        ({"train": {"validation": {"patience": 3}}}, "patience is 3, but every is None"),
        ({"train": {"muon_learning_rate": 0.1, "zero": {"stage": 2}}}, "Muon trains under stage 3"),
        (
            {"method": {"type": "supcon"}, "train": {"validation": {"every": 5}}},
            "of which method supcon has none",
        ),
        (
            {"method": {"type": "supcon"}, "train": {"num_workers": {"min": 1, "max": 2}}},
            r"num_workers is 1 to 2: set it to one number",
        ),
        (
            {
                "episodes": {
                    "stages": [
                        {"episodes": 1, "min_shots_of_both_classes": 10, "max_shots_of_both_classes": 4}
                    ]
                }
            },
            r"\(10\).*\(4\): swap",
        ),
        ({"episodes": {"tasks": [{"type": "two_way", "questions": []}]}}, "at least 1 item"),
        ({"episodes": {"stages": [{"episodes": 1, "min_shots_of_both_classes": 3}]}}, r"\(3\).*odd_shots"),
        ({"episodes": {"preset": "3-way"}}, "preset '3-way' is unknown: choose one of 2-way, "),
        ({"neighbours": {"by": "similarity"}}, "compares embeddings, but embedder is none"),
        (
            {
                "neighbours": {"by": "similarity"},
                "embedder": {"type": "text", "sentence_encoder": "minilm"},
            },
            r"image_text \(0.8\) .* embedder text has no common space",
        ),
        (
            {"neighbours": {"preset": "paper", "search": "approximate"}},
            "'intervals' sorts all concepts",
        ),
        (
            {"corpus": {"reader": {"type": "parquet", "image": None, "url": "url"}}},
            "fetch.enabled is false",
        ),
        ({"corpus": {"reader": {"type": "llava"}}}, "images is none: name their folder"),
        ({"corpus": {"reader": {"type": "parquet", "url": "u"}}}, r"\['image', 'url'\] are named"),
        ({"episodes": {"tasks": [{"type": "instruction"}]}}, "method aim .* hold 'instruction'"),
        ({"episodes": {"part": "test"}}, "'train', .*'held_out_concepts' or 'held_out_style'"),
        ({"train": {"learning_rate": 0}}, "greater than 0 .found 0"),
        ({"evaluate": {"controls": ["none"]}}, "found 'none'"),
        ({"serve": {"port": 70000}}, "found 70000"),
        ({"corpus": None}, "corpus"),
    ],
)
def test_wrong_setting_names_its_values(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_run(None, settings)


def test_default_counts_agree_with_the_worker_count():
    assert RunConfig().episodes.total == 512


def described(schema: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    for name, model in schema["$defs"].items():
        for field, about in model["properties"].items():
            # Sections of the run are described by their own class, tags by the class that they choose.
            yield f"{name}.{field}", "description" in about or field == "type"


def test_schema_describes_every_setting():
    missing = [field for field, known in described(RunConfig.model_json_schema()) if not known]
    assert not missing


@pytest.mark.parametrize("train", [{"global_batch": 6, "num_workers": 2}, {"micro_batch": 3}])
def test_pairs_that_a_batch_would_split_are_refused(train):
    with pytest.raises(ValidationError, match="both must be even"):
        RunConfig.model_validate({"method": {"type": "supcon"}, "train": train})
    RunConfig.model_validate({"method": {"type": "aim"}, "train": train})


@pytest.mark.parametrize(
    ("evaluate", "told"),
    [
        ({"models": [{"name": "a"}, {"name": "a"}]}, r"called \['a', 'a'\]: give each its own name"),
        ({"models": [{"name": "a", "endpoint": "http://x/v1"}]}, "served_model .* belong together"),
        (
            {"models": [{"name": "a", "endpoint": "http://x/v1", "served_model": "m", "raw": 1}]},
            "leave adapter, recipe, backbone and raw out",
        ),
        (
            {"models": [{"name": "a", "endpoint": "http://x/v1", "served_model": "m", "recipe": "r"}]},
            "'a' is asked at http://x/v1.*leave",
        ),
        ({"models": [{"name": "a", "recipe": "r", "adapter": "f"}]}, "by recipe r, but adapter names f"),
        ({"models": [{"name": "a", "settings": {"train.steps": 1}}]}, "'a' has settings .* recipe is None"),
        ({"models": [{"name": "a", "train_seeds": [0]}]}, "'a' has .* train_seeds.* recipe is None"),
        ({"models": [{"name": "a", "recipe": "r", "train_seeds": [1, 1]}]}, r"\[1, 1\]: name each"),
        ({"models": [{"name": "a", "recipe": "r", "seeds": ["f"]}]}, "adapter is None: name its folder"),
        ({"models": [{"name": "a", "raw": 1}]}, "adapter is None: name its folder"),
        ({"models": [{"name": "a"}], "adapter": "folder"}, "say who is asked: put it there"),
        ({"shots": [4, 2]}, r"shots are \[4, 2\]: name each number once, in order"),
        ({"controls": ["upside_down"]}, "upside_down"),
        ({"tasks": []}, "at least 1"),
    ],
)
def test_evaluation_that_contradicts_itself_is_refused(evaluate, told):
    with pytest.raises(ValidationError, match=told):
        RunConfig.model_validate({"evaluate": evaluate})


def test_evaluation_asks_the_backbone_and_the_adapter_unless_models_are_named():
    def names(**evaluate: Any) -> list[str]:
        run = RunConfig.model_validate({"evaluate": evaluate})
        again = RunConfig.model_validate(run.model_dump(mode="json"))
        assert again == run
        return [model.name for model in run.evaluate.asked]

    assert names() == names(adapter="folder") == ["full", "adapted"]
    assert names(adapter=None) == ["full"]
    assert names(models=[{"name": "other"}]) == ["other"]


def test_preset_of_an_evaluation_gives_way_to_what_is_set_beside_it():
    run = RunConfig.model_validate({"evaluate": {"preset": "open_flamingo", "shots": [0, 2]}})
    assert (run.evaluate.shots, run.evaluate.style, run.evaluate.pool) == ((0, 2), "open_flamingo", 2048)
    assert run.evaluate.beams == 3
    assert RunConfig.model_validate(run.model_dump(mode="json")) == run


def test_server_cannot_be_asked_for_beams():
    served = {"name": "far", "endpoint": "http://localhost:1/v1", "served_model": "it"}
    with pytest.raises(ValidationError, match=r"evaluate\.beams is 3.*far.*set beams to 1"):
        RunConfig.model_validate({"evaluate": {"preset": "open_flamingo", "models": [served]}})
    RunConfig.model_validate({"evaluate": {"preset": "open_flamingo", "models": [served], "beams": 1}})


@pytest.mark.parametrize(
    ("preset", "low", "high", "odd", "growth"),
    [
        ("2-way", 16, 16, False, 0.0),
        ("2-way-random", 2, 16, True, 0.0),
        ("2-way-weight", 2, 16, True, 1.0),
        ("mix", 16, 16, False, 0.0),
        ("released-2way-weight", 2, 2, False, 0.0),
        ("released-2way-random-shot", 2, 32, False, 0.25),
    ],
)
def test_preset_is_what_its_source_says_and_yields_to_what_is_set(preset, low, high, odd, growth):
    run = load_run(None, {"episodes": {"preset": preset, "count": 9}}).episodes
    (stage,) = run.stages
    told = (stage.min_shots_of_both_classes, stage.max_shots_of_both_classes, stage.odd_shots, stage.growth)
    assert told == (low, high, odd, growth)
    assert run.total == 9
    released = preset.startswith("released")
    names = ("random_letters", "true_name") if released else ("made_up", "made_up")
    assert (run.tasks[0].positive_name, run.tasks[0].negative_name) == names
    assert [task.type for task in run.tasks[1:]] == (["caption"] if preset == "mix" else [])
    other = load_run(None, {"episodes": {"preset": preset, "same_shots_in_a_row": 4}}).episodes
    assert (other.same_shots_in_a_row, run.same_shots_in_a_row) == (4, 1)


def test_neighbours_as_in_the_paper_and_as_released_are_presets():
    told = [load_run(None, {"neighbours": {"preset": name}}).neighbours for name in ("paper", "released")]
    assert [(one.count, one.choice) for one in told] == [(100, "intervals"), (36, "released_intervals")]

from __future__ import annotations

import pytest

from mmicl_core.config.model import LclConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.errors import ConfigError
from pipelines.settings import RunArguments, parse_run


def parse(*arguments: str) -> RunArguments:
    return parse_run("train", "Train.", arguments)


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  steps: 7\n  seed: 3\n", encoding="utf-8")
    return str(path)


def test_no_flag_gives_the_default_run():
    given = parse()
    assert (given.run, given.output, given.verbose) == (RunConfig(), "runs", False)


def test_flag_overrides_one_value_of_the_recipe(recipe):
    train = parse("--recipe", recipe, "--train.steps", "200").run.train
    assert (train.steps, train.seed) == (200, 3)


def test_recipe_that_comes_along_is_found_by_its_name():
    assert parse("--recipe", "quickstart").run.method == RunConfig().method


def test_recipe_that_does_not_exist_lists_those_that_do():
    with pytest.raises(ConfigError, match="recipe nowhere does not exist; these come along: .*quickstart"):
        parse("--recipe", "nowhere")


@pytest.mark.parametrize("text", ["1,2,4", "[1, 2, 4]"])
def test_list_is_written_with_commas_or_brackets(text):
    assert parse("--evaluate.shots", text).run.evaluate.shots == (1, 2, 4)


def test_nested_list_is_written_as_json():
    stages = parse(
        "--episodes.stages", '[{"episodes": 4, "max_shots_of_both_classes": 6}]'
    ).run.episodes.stages
    told = [
        (stage.episodes, stage.min_shots_of_both_classes, stage.max_shots_of_both_classes) for stage in stages
    ]
    assert told == [(4, 2, 6)]


def test_none_is_written_none():
    assert parse("--evaluate.adapter", "none").run.evaluate.adapter is None


def test_truth_is_written_as_a_value():
    assert parse("--method.layer_norm", "false").run.method.layer_norm is False


def test_method_is_chosen_by_a_flag():
    assert parse("--method.type", "lcl").run.method == LclConfig()


def test_value_may_follow_an_equals_sign():
    assert parse("--train.steps=5").run.train.steps == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--train.stepz", "3"], r"^--train\.stepz is not a setting; did you mean --train\.steps\?$"),
        (["--quux=3"], "^--quux=3 is not a setting; `mmicl train --help` lists them all$"),
        (["extra"], "^extra is not a setting"),
        (["--train.steps"], r"--train\.steps: expected one argument"),
        (["--train.ste", "3"], "did you mean"),
        (["--train.steps", "abc"], r"train\.steps: .*integer.*\(found 'abc'\)"),
        (["--train.global_batch", "1"], r"global_batch \(1\) must be at least num_workers \(2\)"),
        (["--episodes.stages", "[{"], r"episodes\.stages.*`mmicl train --help`"),
        (["--evaluate.controls", "{'a': 1}"], r"evaluate.*double quotes.*`mmicl train --help`"),
        (
            ["--method.type", "magic"],
            "'magic'.*'aim', 'mmict', 'm2pt', 'lcl', 'lora', 'prompt_tuning', 'mtv', 'supcon'",
        ),
    ],
)
def test_mistake_is_one_sentence_with_a_remedy(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


def test_help_describes_every_setting_and_no_default_that_a_recipe_may_change(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for section, field in RunConfig.model_fields.items():
        for name in getattr(field.annotation, "model_fields", {}):
            assert f"--{section}.{name}" in text
    assert "Optimiser steps." in text
    assert text.count("(default:") == 1


def test_environment_does_not_change_a_run(monkeypatch):
    monkeypatch.setenv("TRAIN", '{"steps": 5}')
    monkeypatch.setenv("train.steps", "5")
    assert parse().run == RunConfig()


def test_number_among_few_is_written_as_any_number():
    assert parse("--train.zero.stage", "2").run.train.zero.stage == 2
    with pytest.raises(ConfigError, match=r"train\.zero\.stage: Input should be 0, 1, 2 or 3"):
        parse("--train.zero.stage", "4")

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmicl_core.config.model import LclConfig
from mmicl_core.methods.adapter import CONFIG_FILE
from pipelines.origins import training_of
from pipelines.stages import Stage


def adapter(folder: Path, **about: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    told = {"method": "aim", "parameters": {"a": [3, 4], "b": [5]}, "code": "old", **about}
    (folder / CONFIG_FILE).write_text(json.dumps(told), encoding="utf-8")
    return folder


def stage(root: Path, seed: int, **manifest: Any) -> Path:
    made = Stage(root, "train-lcl", seed=seed, method=LclConfig())
    made.run(lambda folder: (folder / "result").mkdir() or manifest)
    return made.folder / "result"


def test_whole_models_are_told_by_the_stages_that_trained_them(tmp_path: Path) -> None:
    folders = [
        stage(tmp_path, seed, steps=9, seconds=1.5 + seed, trained_parameters=7, code=f"c{seed}")
        for seed in range(2)
    ]
    assert training_of(folders) == {
        "method": "lcl",
        "trained_parameters": 7,
        "steps": [9, 9],
        "seconds": [1.5, 2.5],
        "code": ["c0", "c1"],
    }


def test_adapter_tells_of_itself_where_no_stage_does(tmp_path: Path) -> None:
    told = training_of([adapter(tmp_path / "mine")])
    assert told is not None
    assert (told["method"], told["trained_parameters"]) == ("aim", 17)
    assert (told["steps"], told["seconds"], told["code"]) == ([None], [None], ["old"])


def test_stage_knows_better_than_the_adapter_in_it(tmp_path: Path) -> None:
    folder = adapter(stage(tmp_path, 0, trained_parameters=0, seconds=2.0, code="new"), method="mtv")
    told = training_of([folder])
    assert told is not None
    # What is kept need not be trained.
    assert (told["method"], told["trained_parameters"], told["code"]) == ("mtv", 0, ["new"])


def test_model_of_which_nothing_is_known_is_not_trained(tmp_path: Path) -> None:
    assert training_of([tmp_path]) is None and training_of([]) is None

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from scipy.stats import chisquare

from mmicl_core.config.episodes import EpisodeConfig
from tests.unit.data.draws import config_of, draw_rows, mixed_pool, reasons_of


def _config(**settings: Any) -> EpisodeConfig:
    return config_of(8, {"type": "instruction"}, **settings)


def _talks(task: str, *lengths: int) -> list[dict[str, Any]]:
    """Pictures with conversations of so many turns."""
    return [
        {"group": task, "picture": f"{task}-{number}", "text": "a caption"}
        | {"turns": [{"question": f"q{turn}", "answer": f"{task}{number}a{turn}"} for turn in range(length)]}
        for number, length in enumerate(lengths)
    ]


def test_whole_conversation_is_scored_and_only_its_first_turn_has_the_picture(tmp_path: Path) -> None:
    config = _config()
    lengths = (1, 2, 3, 5)
    met = set()
    for episode in draw_rows(mixed_pool(tmp_path, config, tasks=_talks("vqa", *lengths)), config):
        first, *others = episode["turns"]
        number = int(first["picture"].rpartition("-")[2])
        assert all(turn["picture"] is None and turn["image"] is None for turn in others)
        assert all(turn["scored"] for turn in episode["turns"])
        told = [(turn["question"], turn["answer"]) for turn in episode["turns"]]
        assert told == [(f"q{turn}", f"vqa{number}a{turn}") for turn in range(lengths[number])]
        assert (episode["shots_of_both_classes"], episode["answer"]) == (0, told[-1][1])
        met.add(number)
    assert met == {0, 1, 2, 3}


def test_every_conversation_is_as_likely_as_any_other(tmp_path: Path) -> None:
    config = _config()
    rows = [*_talks("vqa", *[1] * 3), *_talks("ocr", *[2] * 17)]
    drawn = draw_rows(mixed_pool(tmp_path, config, tasks=rows), config, 2000)
    seen = Counter(episode["turns"][0]["picture"] for episode in drawn)
    assert len(seen) == 20 and chisquare(list(seen.values())).pvalue > 1e-3


def test_picture_without_a_conversation_is_never_drawn_and_a_task_of_them_is_a_reason(tmp_path: Path) -> None:
    config = _config()
    rows = [*_talks("vqa", 0, 1, 0, 2), *_talks("caption", 0, 0)]
    pool = mixed_pool(tmp_path, config, tasks=rows)
    seen = {episode["turns"][0]["picture"] for episode in draw_rows(pool, config)}
    assert seen == {"vqa-1", "vqa-3"}
    assert reasons_of(pool, config) == {None, "instruction: task without a conversation"}


def test_pictures_kept_back_are_drawn_in_the_held_out_parts_alone(tmp_path: Path) -> None:
    rows = _talks("vqa", 1, 1, 1, 1)
    rows[2]["kept_back"] = rows[3]["kept_back"] = True
    for part, expected in (("train", {"vqa-0", "vqa-1"}), ("held_out_concepts", {"vqa-2", "vqa-3"})):
        config = _config(part=part)
        drawn = draw_rows(mixed_pool(tmp_path / part, config, tasks=rows), config)
        assert {episode["turns"][0]["picture"] for episode in drawn} == expected

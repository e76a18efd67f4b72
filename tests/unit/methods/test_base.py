from __future__ import annotations

import pytest

from mmicl_core.config.model import (
    AimConfig,
    LclConfig,
    LoraConfig,
    MethodConfig,
    PromptTuningConfig,
    SupConConfig,
)
from mmicl_core.methods import METHODS, build_method
from mmicl_core.methods.base import Plain, episode_turns
from mmicl_core.methods.lcl import Lcl
from mmicl_core.prompts import Turn, count_text
from tests.fakes import episode_row, random_pictures, tiny_backbone

ROWS = [{"shots_of_both_classes": shots} for shots in (1, 1, 1, 4, 4, 2, 2, 2, 2, 1)]


def test_first_pass_keeps_the_curriculum_and_later_ones_move_equal_shots_together() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    assert method.epoch_order(ROWS, 0, seed=0) == list(range(10))
    later = [method.epoch_order(ROWS, epoch, seed=0) for epoch in range(1, 6)]
    for order in later:
        assert sorted(order) == list(range(10))
        assert {tuple(order[n : n + 3]) for n in range(8)} >= {(0, 1, 2)}
        assert {tuple(order[n : n + 4]) for n in range(7)} >= {(5, 6, 7, 8)}
    assert len({tuple(order) for order in later}) > 1
    assert method.epoch_order(ROWS, 1, seed=0) == later[0]


@pytest.mark.parametrize(
    "config", [AimConfig(), LclConfig(), LoraConfig(), PromptTuningConfig(), SupConConfig()]
)
def test_every_method_config_builds_the_method_of_its_row(config: MethodConfig) -> None:
    method = build_method(tiny_backbone(), config)
    assert type(method) is METHODS[config.type]
    assert method.config == config


def test_turns_of_a_row_are_its_questions_with_their_pictures_and_those_without_one() -> None:
    row = episode_row(["a", "b"], ["bako", "mute"])
    row["turns"][0]["picture"] = None
    assert episode_turns(row) == [
        Turn((), "This is", "bako"),
        Turn(("b",), "This is", "mute", scored=True),
    ]


def test_plain_model_trains_nothing_and_writes_every_demonstration_out() -> None:
    method = Plain(tiny_backbone())
    assert not method.trainable()
    pictures = random_pictures(["a", "b", "c"], method.backbone)
    row = episode_row(["a", "b", "c"], ["bako", "mute", "bako"], "This is surely")
    turns = episode_turns(row)
    packed = method.collate([row], pictures, None).packed
    costs = [method.demonstration_tokens(turn, pictures) for turn in turns]
    assert costs == [25 + count_text(method.chat.turn(turn)) for turn in turns]
    assert packed.ids_BL.shape[1] == count_text(method.chat.prefix()) + sum(costs)
    assert not packed.fused_BL.any()


def test_prompts_are_padded_on_the_side_that_is_asked_for_and_a_query_waits_for_its_answer() -> None:
    method = Plain(tiny_backbone())
    rows = [episode_row(["a", "b"], ["bako", "mute"]), episode_row(["c"], ["sidu"])]
    for row in rows:
        row["turns"][-1]["answer"] = None
    pictures = random_pictures(["a", "b", "c"], method.backbone)
    right, left = (method.collate(rows, pictures, None, side).packed for side in ("right", "left"))
    assert right.mask_BL[1].diff().min() == -1 and left.mask_BL[1].diff().min() == 0
    answer = method.backbone.tokenizer.convert_tokens_to_ids("<answer>")
    assert left.ids_BL[:, -1].tolist() == [answer, answer]
    assert left.num_scored == right.num_scored == 0

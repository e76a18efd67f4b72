from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmicl_core.config.model import AimConfig
from mmicl_core.data.collate import pack
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.aim import Aggregator, Aim, fused_prompt, read_demonstrations
from mmicl_core.methods.base import answer_nll, episode_turns, prompt_embeddings
from mmicl_core.methods.lcl import full_prompt
from mmicl_core.prompts import ChatFormat, Turn, demonstration_key
from tests.fakes import PlainEngine, episode_row, random_vision, tiny_backbone

PICTURES = [f"p{number}" for number in range(6)]
TURNS = [
    Turn("p0", "This is", "bako"),
    Turn("p1", "This is surely", "mutedi"),
    Turn("p2", "This", "ko"),
]
# 32-bit sums in another order differ in the last bits; hidden states are of the order of 1.
LAST_BITS = {"atol": 1e-5, "rtol": 1e-4}


def _read(turns: list[Turn]) -> list[Tensor]:
    backbone = tiny_backbone()
    vision = random_vision(PICTURES, backbone)
    stacked = torch.from_numpy(np.stack([vision[str(turn.picture)] for turn in turns]))
    return read_demonstrations(backbone, ChatFormat(backbone.processor), turns, stacked)


def _method(**settings: Any) -> Aim:
    return Aim(tiny_backbone(), AimConfig(**settings))


def _batch(method: Aim, rows: list[dict[str, Any]]) -> Any:
    vision = random_vision(PICTURES, method.backbone)
    states = {}
    for row in rows:
        for turn in episode_turns(row)[:-1]:
            stacked = torch.from_numpy(vision[str(turn.picture)])[None]
            read = read_demonstrations(method.backbone, method.chat, [turn], stacked)
            states[demonstration_key(turn)] = read[0].numpy()
    return method.collate(rows, vision, states)


ROWS = [
    episode_row(["p0", "p1", "p2"], ["bako", "mute", "bako"]),
    episode_row(["p2", "p3", "p4", "p1", "p5"], ["sidu", "goma", "goma", "sidu", "goma"], "This is surely"),
]


def test_fused_tokens_are_unchanged_by_batch_neighbours_and_their_padding() -> None:
    together = _read(TURNS)
    apart = [_read([turn])[0] for turn in TURNS]
    backwards = _read(TURNS[::-1])[::-1]
    assert len({len(states) for states in together}) == 3
    for one, two, three in zip(together, apart, backwards, strict=True):
        torch.testing.assert_close(one, two, **LAST_BITS)
        torch.testing.assert_close(one, three, **LAST_BITS)


def test_states_kept_in_16_bits_train_under_autocast_the_same_way_but_for_rounding() -> None:
    method = _method()
    batch = _batch(method, ROWS)
    kept = replace(batch, shown=[states.half() for states in batch.shown])
    whole = method(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method(kept)
    rounded.sum().backward()
    assert method.aggregator.projection.weight.grad.isfinite().all()
    assert not torch.equal(rounded, whole)
    torch.testing.assert_close(rounded, whole, rtol=0.02, atol=0.02)


def test_states_of_a_demonstration_depend_on_its_picture() -> None:
    one, other = (_read([Turn(picture, "This is", "bako")])[0] for picture in ("p0", "p1"))
    assert one.shape == other.shape
    # Every text position stands behind the picture and has read it.
    assert ((one - other).abs().amax(1) > 1e-3).all()


def test_states_are_those_of_the_text_behind_the_prefix() -> None:
    backbone = tiny_backbone()
    chat = ChatFormat(backbone.processor)
    vision = torch.from_numpy(random_vision(PICTURES, backbone)["p0"])[None]
    packed = pack(
        [full_prompt(chat, TURNS[:1])], visual_tokens=25, padding_id=backbone.tokenizer.pad_token_id
    )
    hidden = backbone.hidden(prompt_embeddings(backbone, packed, vision), packed.mask_BL)[0]
    # <s>, 25 visual tokens, then the text.
    torch.testing.assert_close(_read(TURNS[:1])[0], hidden[26:], **LAST_BITS)


def test_prompt_length_of_a_demonstration_is_its_text_tokens_only() -> None:
    method = _method()
    demonstration = method.chat.turn(TURNS[0])
    full = sum(len(piece.ids) if piece.kind == "text" else 25 for piece in demonstration)
    fused = len(_read(TURNS[:1])[0])
    assert (full, fused) == (31, 6)
    packed = _batch(method, ROWS[:1]).packed
    question = len(method.chat.turn(Turn("p2", "This is", "bako"))[1].ids)
    answer = len(method.chat.turn(Turn("p2", "This is", "bako"))[2].ids)
    assert packed.ids_BL.shape[1] == 1 + 2 * fused + 25 + question + answer
    assert int(packed.fused_BL.sum()) == 2 * fused


def test_identity_aggregator_of_token_embeddings_gives_the_logits_of_the_real_text() -> None:
    backbone = tiny_backbone()
    chat = ChatFormat(backbone.processor)
    vision = torch.from_numpy(random_vision(PICTURES, backbone)["p5"])[None]
    texts = [[piece.ids for piece in chat.turn(Turn(None, turn.question, turn.answer))] for turn in TURNS]
    ids = [torch.tensor([token for part in text for token in part]) for text in texts]
    query = Turn("p5", "This is", "bako", scored=True)
    aggregator = Aggregator(backbone.width, layer_norm=False)
    fused_TD = [aggregator(backbone.embed(row)) for row in ids]
    arguments = {"visual_tokens": 25, "padding_id": backbone.tokenizer.pad_token_id}
    fused = pack([fused_prompt(chat, 3, query)], fused_tokens=[[len(row) for row in ids]], **arguments)
    real = full_prompt(chat, [*(Turn(None, turn.question, turn.answer) for turn in TURNS), query])
    plain = pack([real], **arguments)
    behind_fused = answer_nll(backbone, prompt_embeddings(backbone, fused, vision, fused_TD), fused)
    behind_text = answer_nll(backbone, prompt_embeddings(backbone, plain, vision), plain)
    torch.testing.assert_close(behind_fused, behind_text, **LAST_BITS)


def test_loss_of_a_batch_is_that_of_its_episodes_alone() -> None:
    method = _method()
    together = method(_batch(method, ROWS))
    apart = torch.cat([method(_batch(method, [row])) for row in ROWS])
    torch.testing.assert_close(together, apart, **LAST_BITS)


def test_loss_depends_on_the_demonstrations_and_on_their_order() -> None:
    method = _method()
    batch = _batch(method, ROWS[:1])
    turned = _batch(method, [ROWS[0] | {"turns": [ROWS[0]["turns"][i] for i in (1, 0, 2)]}])
    # The untrained model answers them differently; how much differs does not matter.
    assert (method(batch) - method(turned)).abs().max() > 1e-4


def test_gradient_reaches_the_aggregator_and_nothing_else() -> None:
    method = _method()
    method(_batch(method, ROWS)).sum().backward()
    moved = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert moved == {f"aggregator.{name}" for name, _ in method.aggregator.named_parameters()}
    assert moved == method.trainable().keys()
    assert all(float(parameter.grad.detach().abs().max()) > 0 for parameter in method.trainable().values())


def test_aggregator_starts_at_the_spread_of_the_token_embeddings() -> None:
    method = _method()
    spread = float(method.backbone.embed(torch.arange(300)).std())
    fused = method.aggregator(torch.randn(100, 32) * 7).detach()
    # LayerNorm gives every token a spread of 1 times its weight.
    assert float(fused.std()) == pytest.approx(spread, rel=0.05)


def test_aggregator_learns_two_episodes_by_heart() -> None:
    torch.manual_seed(0)
    method = _method()
    engine = PlainEngine(method)
    batch = _batch(method, ROWS)
    first = float(method(batch).detach().mean())
    for _ in range(60):
        engine.backward(method(batch).mean())
        engine.step(1e-2)
    # Four answer tokens and a projection of a thousand weights behind a frozen, untrained model.
    assert float(method(batch).detach().mean()) < first / 2


def test_saved_aggregator_is_read_back_as_it_was(tmp_path: Path) -> None:
    for layer_norm in (True, False):
        method = _method(layer_norm=layer_norm)
        torch.nn.init.normal_(method.aggregator.projection.weight)
        method.save(tmp_path)
        found = Aggregator.load(tmp_path, method.backbone)
        states = torch.randn(5, method.backbone.width)
        assert torch.equal(found(states), method.aggregator(states))
        assert not any(parameter.requires_grad for parameter in found.parameters())


def test_training_goes_on_from_a_saved_aggregator(tmp_path: Path) -> None:
    first = _method()
    torch.nn.init.normal_(first.aggregator.projection.weight)
    first.save(tmp_path)
    second = _method(start=str(tmp_path))
    assert second.trainable().keys() == first.trainable().keys()
    for name, parameter in second.trainable().items():
        assert torch.equal(parameter, first.trainable()[name])


def test_aggregator_of_another_backbone_is_refused_with_both_names(tmp_path: Path) -> None:
    _method().save(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"backbone tiny-0 of width 32, the model is tiny-1 of width 32"
    ):
        Aggregator.load(tmp_path, tiny_backbone(seed=1))
    with pytest.raises(CheckpointError, match="of width 64"):
        Aggregator.load(tmp_path, tiny_backbone(width=64))


def test_folder_without_a_readable_aggregator_is_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    with pytest.raises(CheckpointError, match="holds no aggregator"):
        Aggregator.load(tmp_path, backbone)
    _method().save(tmp_path)
    weights = tmp_path / "aggregator.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Aggregator.load(tmp_path, backbone)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Aggregator.load(tmp_path, backbone)
    (tmp_path / "aggregator.json").write_text(json.dumps({"width": 32}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Aggregator.load(tmp_path, backbone)

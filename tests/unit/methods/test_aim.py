from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmicl_core.backbones.vision import join
from mmicl_core.config.model import AimConfig
from mmicl_core.data.collate import pack
from mmicl_core.methods import load_method
from mmicl_core.methods.aim import Aggregator, Aim, Reader
from mmicl_core.methods.base import episode_turns
from mmicl_core.prompts import Turn, count_text, demonstration_key
from tests.fakes import PlainEngine, episode_row, random_pictures, tiny_backbone

PICTURES = [f"p{number}" for number in range(6)]
TURNS = [
    Turn(("p0",), "This is", "bako"),
    Turn(("p1",), "This is surely", "mutedi"),
    Turn(("p2",), "This", "ko"),
]
# 32-bit sums in another order differ in the last bits; hidden states are of the order of 1.
LAST_BITS = {"atol": 1e-5, "rtol": 1e-4}


def _read(turns: list[Turn], **settings: Any) -> list[Tensor]:
    backbone = tiny_backbone()
    reader = Reader(backbone, AimConfig(**settings))
    return reader.read(reader.pack(turns, random_pictures(PICTURES, backbone)))


def _method(**settings: Any) -> Aim:
    return Aim(tiny_backbone(), AimConfig(**settings))


def _batch(method: Aim, rows: list[dict[str, Any]], raw: Iterable[int] = repeat(0)) -> Any:
    pictures = random_pictures(PICTURES, method.backbone)
    states, conversations = {}, [episode_turns(row) for row in rows]
    for turns in conversations:
        for turn in turns[:-1]:
            (read,) = method.reader.read(method.reader.pack([turn], pictures))
            states[demonstration_key(turn)] = read.numpy()
    return method.arrange(conversations, pictures, raw=raw, states=states)


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
    one, other = (_read([Turn((picture,), "This is", "bako")])[0] for picture in ("p0", "p1"))
    assert one.shape == other.shape
    # Every text position stands behind the picture and has read it.
    assert ((one - other).abs().amax(1) > 1e-3).all()


def test_states_of_a_demonstration_depend_on_every_picture_and_on_their_order() -> None:
    seen = [("p0", "p1"), ("p1", "p0"), ("p0", "p2"), ("p2", "p1")]
    states = [_read([Turn(pictures, "This is", "bako")])[0] for pictures in seen]
    for number, one in enumerate(states):
        for other in states[number + 1 :]:
            assert one.shape == other.shape
            assert ((one - other).abs().amax(1) > 1e-3).all()


def test_states_are_those_of_the_text_behind_the_prefix() -> None:
    backbone = tiny_backbone()
    prepared = random_pictures(PICTURES, backbone)["p0"]
    prompt = backbone.chat.conversation(TURNS[:1])
    packed = pack([prompt], pictures=[prepared], padding_id=backbone.tokenizer.pad_token_id)
    hidden = backbone.read(backbone.embed(packed, backbone.see(join([prepared])))).last_hidden_state[0]
    # <s>, 25 visual tokens, then the text.
    torch.testing.assert_close(_read(TURNS[:1])[0], hidden[26:], **LAST_BITS)


def test_states_of_the_answer_alone_are_the_last_ones_of_the_text() -> None:
    for whole, answer, turn in zip(_read(TURNS), _read(TURNS, text="answer"), TURNS, strict=True):
        length = len(tiny_backbone().chat.turn(turn)[-1].ids)
        assert len(answer) == length < len(whole)
        assert torch.equal(answer, whole[-length:])


def test_states_are_read_from_the_layer_that_is_named() -> None:
    backbone = tiny_backbone()
    pieces = backbone.chat.turn(TURNS[0])
    ids = torch.tensor([token for piece in pieces for token in piece.ids])
    # The input of the first layer are the words themselves.
    assert torch.equal(_read(TURNS[:1], layer=0)[0], backbone.model.get_input_embeddings()(ids))
    (first,), (last,) = (_read(TURNS[:1], layer=layer) for layer in (1, None))
    assert (first - last).abs().max() > 0.1
    shown = Reader(backbone, AimConfig()).pack(TURNS[:1], random_pictures(PICTURES, backbone))
    prompts = backbone.embed(shown.packed, backbone.see(shown.pictures))
    entered = list[Tensor]()
    hook = backbone.layers[1].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    backbone.read(prompts)
    hook.remove()
    torch.testing.assert_close(first, entered[0][0, -len(first) :], **LAST_BITS)


def test_prompt_length_of_a_demonstration_is_its_text_tokens_only() -> None:
    method = _method()
    pictures = random_pictures(PICTURES, method.backbone)
    demonstration = method.chat.turn(TURNS[0])
    full = sum(len(piece.ids) if piece.kind == "text" else 25 for piece in demonstration)
    fused = len(_read(TURNS[:1])[0])
    assert (full, fused) == (31, 6)
    assert method.demonstration_tokens(TURNS[0], pictures) == fused
    packed = _batch(method, ROWS[:1]).packed
    question = len(method.chat.turn(Turn(("p2",), "This is", "bako"))[1].ids)
    answer = len(method.chat.turn(Turn(("p2",), "This is", "bako"))[2].ids)
    assert packed.ids_BL.shape[1] == 1 + 2 * fused + 25 + question + answer
    assert int(packed.fused_BL.sum()) == 2 * fused


def test_separator_stands_behind_every_fused_demonstration_and_is_counted() -> None:
    plain, method = _method(), _method(separator=" so ")
    pictures = random_pictures(PICTURES, method.backbone)
    between = method.backbone.tokenizer(" so ", add_special_tokens=False)["input_ids"]
    row = _batch(method, ROWS[:1]).packed
    fused = row.fused_BL[0]
    ends = [place + 1 for place in range(len(fused) - 1) if fused[place] and not fused[place + 1]]
    assert [row.ids_BL[0, end : end + len(between)].tolist() for end in ends] == [between] * 2
    assert row.ids_BL.shape[1] == _batch(plain, ROWS[:1]).packed.ids_BL.shape[1] + 2 * len(between)
    costs = [one.demonstration_tokens(TURNS[0], pictures) for one in (plain, method)]
    assert costs[1] - costs[0] == len(between)


def test_fused_tokens_to_keep_have_the_separator_behind_them() -> None:
    method = _method(separator=" so ")
    states_TD = _read(TURNS)
    between = method.backbone.tokenizer(" so ", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    words = method.backbone.model.get_input_embeddings()(between)
    for kept, fused in zip(method.fuse_to_keep(states_TD), method.fuse(states_TD), strict=True):
        assert torch.equal(kept, torch.cat([fused, words]))


def test_batch_without_demonstrations_calls_the_aggregator_with_a_gradient_of_zero() -> None:
    method = _method()
    rows = [{**row, "turns": row["turns"][-1:]} for row in ROWS]
    method(method.collate(rows, random_pictures(PICTURES, method.backbone), None)).sum().backward()
    assert all(bool((p.grad == 0).all()) for p in method.trainable().values())


def test_fused_tokens_of_two_packs_are_those_of_one_pack_of_both() -> None:
    method = _method()
    torch.nn.init.normal_(method.aggregator.projection.weight)
    together = method.fuse(_read(TURNS))
    apart = [fused for turns in (TURNS[:1], TURNS[1:]) for fused in method.fuse(_read(turns))]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, **LAST_BITS)


def test_identity_aggregator_of_token_embeddings_gives_the_logits_of_the_real_text() -> None:
    backbone = tiny_backbone()
    chat, words = backbone.chat, backbone.model.get_input_embeddings()
    prepared = random_pictures(PICTURES, backbone)["p5"]
    visual = backbone.see(join([prepared]))
    texts = [[piece.ids for piece in chat.turn(Turn((), turn.question, turn.answer))] for turn in TURNS]
    ids = [torch.tensor([token for part in text for token in part]) for text in texts]
    query = Turn(("p5",), "This is", "bako", scored=True)
    aggregator = Aggregator(backbone.width, AimConfig(layer_norm=False))
    fused_TD = torch.cat([aggregator(words(row)) for row in ids])
    arguments: Any = {"pictures": [prepared], "padding_id": backbone.tokenizer.pad_token_id}
    fused = pack([chat.conversation([query], 3)], fused_tokens=[len(row) for row in ids], **arguments)
    real = chat.conversation([*(Turn((), turn.question, turn.answer) for turn in TURNS), query])
    plain = pack([real], **arguments)
    behind_fused = backbone.answer_nll(backbone.embed(fused, visual, fused_TD), fused)
    behind_text = backbone.answer_nll(backbone.embed(plain, visual), plain)
    torch.testing.assert_close(behind_fused, behind_text, **LAST_BITS)


def test_states_read_with_the_queries_give_the_loss_of_kept_ones() -> None:
    method = _method()
    pictures = random_pictures(PICTURES, method.backbone)
    kept, read = _batch(method, ROWS), method.collate(ROWS, pictures, None)
    for name, tensor in vars(kept.packed).items():
        assert torch.equal(tensor, getattr(read.packed, name)), name
    torch.testing.assert_close(method(read), method(kept), **LAST_BITS)


@pytest.mark.parametrize("kept", [True, False])
def test_last_demonstrations_are_written_out_where_that_is_asked(kept: bool) -> None:
    method = _method()
    pictures = random_pictures(PICTURES, method.backbone)
    turns = [episode_turns(row) for row in ROWS]
    batch = _batch(method, ROWS, (1, 9)) if kept else method.arrange(turns, pictures, raw=(1, 9))
    (first, *_), _ = turns
    # One demonstration of the first row is fused, and none of the second.
    assert batch.packed.fused_BL.sum(1).tolist() == [count_text(method.chat.turn(first)), 0]
    assert batch.packed.image_BL.sum(1).tolist() == [2 * 25, 5 * 25]
    second = batch.packed.ids_BL[1, batch.packed.text_BL[1]].tolist()
    assert second == [token for piece in method.chat.conversation(turns[1]) for token in piece.ids]
    # A demonstration that is written out costs and says what it does without an adapter.
    whole = method.arrange([turns[1]], pictures, raw=(9,))
    plain = pack(
        [method.chat.conversation(turns[1])],
        pictures=[pictures[key] for turn in turns[1] for key in turn.pictures],
        padding_id=method.padding_id,
    )
    nll = method.backbone.answer_nll(method.backbone.embed(plain, method.backbone.see(whole.pictures)), plain)
    torch.testing.assert_close(method(whole), nll, **LAST_BITS)


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
    spread = float(method.backbone.model.get_input_embeddings()(torch.arange(300)).std())
    fused = method.aggregator(torch.randn(100, 32) * 7).detach()
    # LayerNorm gives every token a spread of 1 times its weight.
    assert float(fused.std()) == pytest.approx(spread, rel=0.05)


def test_projection_starts_as_the_identity_or_at_random() -> None:
    torch.manual_seed(0)
    states = torch.randn(5, 32)
    identity = Aggregator(32, AimConfig(layer_norm=False))
    assert torch.equal(identity(states), states)
    random = Aggregator(32, AimConfig(layer_norm=False, initial="random"))
    assert (random(states) - states).abs().max() > 1


def test_aggregator_learns_two_episodes_by_heart() -> None:
    torch.manual_seed(0)
    method = _method()
    engine = PlainEngine(method, learning_rate=1e-2)
    batch = _batch(method, ROWS)
    first = float(method(batch).detach().mean())
    for _ in range(60):
        engine.backward(method(batch).mean())
        engine.step(1.0)
    # Four answer tokens and a projection of a thousand weights behind a frozen, untrained model.
    assert float(method(batch).detach().mean()) < first / 2


def test_saved_aggregator_is_read_back_as_it_was(tmp_path: Path) -> None:
    for layer_norm in (True, False):
        method = _method(layer_norm=layer_norm)
        torch.nn.init.normal_(method.aggregator.projection.weight)
        method.save(tmp_path, {"backbone_name": "tiny"})
        found = load_method(tmp_path, method.backbone)
        assert isinstance(found, Aim)
        assert found.config == method.config.model_copy(update={"start": str(tmp_path)})
        states = torch.randn(5, method.backbone.width)
        assert torch.equal(found.aggregator(states), method.aggregator(states))
        assert not any(parameter.requires_grad for parameter in found.parameters())
        assert not found.training
        about = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
        assert about["backbone_name"] == "tiny"
        assert set(about["parameters"]) == set(method.trainable())

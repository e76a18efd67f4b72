from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.config.model import LclConfig
from mmicl_core.data.collate import NOT_SCORED
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.methods.base import episode_turns
from mmicl_core.methods.lcl import Lcl
from tests.fakes import PlainEngine, draw_picture, episode_row, tiny_backbone

PICTURES = [f"p{number}" for number in range(5)]
SHORT = episode_row(["p0", "p1", "p2"], ["bako", "mute", "bako"])
LONG = episode_row(PICTURES, ["sidu", "goma", "goma", "sidu", "goma"], "This is surely")
# 32-bit sums in another order differ in the last bits; losses are of the order of 10.
LAST_BITS = {"atol": 1e-5, "rtol": 1e-5}


def _dense(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"turns": [turn | {"scored": number > 0} for number, turn in enumerate(row["turns"])]}


def _method() -> Lcl:
    return Lcl(tiny_backbone(), LclConfig())


def _seen(backbone: HuggingFaceBackbone) -> tuple[dict[str, PreparedPicture], list[Image.Image]]:
    """Real pictures and what the model's processor makes of them."""
    pictures = [draw_picture(number) for number in range(len(PICTURES))]
    return dict(zip(PICTURES, backbone.prepare(pictures), strict=True)), pictures


def _stock_loss(backbone: HuggingFaceBackbone, row: dict[str, Any], pictures: list[Image.Image]) -> Tensor:
    """The scored tokens' losses by the stock processor and `model(input_ids, pixel_values)` alone."""
    messages = []
    for turn in row["turns"]:
        question = [{"type": "image"}, {"type": "text", "text": turn["question"]}]
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn["answer"]}]})
    text = backbone.processor.apply_chat_template(messages)
    inputs = backbone.processor(images=pictures, text=text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = backbone.model(**inputs).logits[0]
    (ids,) = inputs["input_ids"]
    nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    scored, turn, answering = [], 0, False
    for token in backbone.tokenizer.convert_ids_to_tokens(ids):
        scored.append(answering and row["turns"][turn]["scored"])
        if token == "<answer>":
            answering = True
        elif token == "</s>":
            turn, answering = turn + 1, False
    return nll[torch.tensor(scored[1:])]


def test_loss_is_that_of_the_stock_model_on_ids_and_pixels() -> None:
    method = _method()
    prepared, pictures = _seen(method.backbone)
    for row in (LONG, _dense(LONG)):
        ours = method(method.collate([row], prepared, None)).detach()
        stock = _stock_loss(method.backbone, row, pictures)
        assert len(ours) == (3 if row is LONG else 12)
        torch.testing.assert_close(ours, stock, **LAST_BITS)


def test_loss_with_the_tower_in_training_is_that_of_the_stock_model_on_ids_and_pixels() -> None:
    method = Lcl(tiny_backbone(), LclConfig(train_vision_tower=True))
    prepared, pictures = _seen(method.backbone)
    ours = method(method.collate([LONG], prepared, None))
    torch.testing.assert_close(ours.detach(), _stock_loss(method.backbone, LONG, pictures), **LAST_BITS)
    ours.sum().backward()
    trained = method.trainable()
    assert {id(p) for p in trained.values()} == {id(p) for p in method.backbone.parameters()}
    assert float(method.backbone.vision_tower.embeddings.patch_embedding.weight.grad.abs().max()) > 0


def test_loss_of_a_batch_is_that_of_its_conversations_alone() -> None:
    method = _method()
    pictures, _ = _seen(method.backbone)
    together = method(method.collate([SHORT, LONG], pictures, None))
    apart = torch.cat([method(method.collate([row], pictures, None)) for row in (SHORT, LONG)])
    torch.testing.assert_close(together, apart, **LAST_BITS)


def test_loss_of_scored_positions_is_that_over_the_whole_vocabulary() -> None:
    method = _method()
    batch = method.collate([_dense(SHORT), LONG], _seen(method.backbone)[0], None)
    embeds = torch.randn(*batch.packed.ids_BL.shape, method.backbone.width)
    prompts = replace(method.embed(batch), embeds_BLD=embeds)
    quick = method.backbone.answer_nll(prompts, batch.packed)
    logits = method.backbone.logits(method.backbone.read(prompts).last_hidden_state)
    slow = F.cross_entropy(
        logits[:, :-1].transpose(1, 2),
        batch.packed.labels_BL[:, 1:],
        ignore_index=NOT_SCORED,
        reduction="none",
    )
    torch.testing.assert_close(quick, slow[batch.packed.labels_BL[:, 1:] != NOT_SCORED], **LAST_BITS)


def test_language_model_projector_and_head_are_trained_and_the_tower_never() -> None:
    method = _method()
    prepared, _ = _seen(method.backbone)
    method(method.collate([SHORT, LONG], prepared, None)).sum().backward()
    backbone = method.backbone
    for part in (backbone.language_model, backbone.projector, backbone.head):
        assert all(float(p.grad.abs().max()) > 0 for p in part.parameters())
    assert all(p.grad is None and not p.requires_grad for p in backbone.vision_tower.parameters())
    trained = {id(parameter) for parameter in method.trainable().values()}
    tower = {id(parameter) for parameter in backbone.vision_tower.parameters()}
    assert trained == {id(parameter) for parameter in backbone.parameters()} - tower


def test_projector_alone_is_trained_where_the_language_model_is_not_and_a_whole_model_is_saved(
    tmp_path: Path,
) -> None:
    method = Lcl(tiny_backbone(), LclConfig(train_language_model=False))
    backbone, before = method.backbone, tiny_backbone().model.state_dict()
    prepared, _ = _seen(backbone)
    engine = PlainEngine(method, learning_rate=1e-2)
    engine.backward(method(method.collate([LONG], prepared, None)).mean())
    engine.step(1.0)
    trained = {id(parameter) for parameter in method.trainable().values()}
    assert trained == {id(parameter) for parameter in backbone.projector.parameters()}
    after = backbone.model.state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}
    method.save(tmp_path, {})
    found = load_backbone(tmp_path).projector.linear_1.weight
    torch.testing.assert_close(found, backbone.projector.linear_1.weight, rtol=1e-3, atol=1e-4)


def test_updates_of_a_language_model_that_is_not_trained_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"lora_rank \(4\) .* which train_language_model"):
        LclConfig(lora_rank=4, train_language_model=False)


def test_model_learns_two_conversations_by_heart() -> None:
    method = _method()
    engine = PlainEngine(method, learning_rate=1e-2)
    batch = method.collate([SHORT, LONG], _seen(method.backbone)[0], None)
    for _ in range(60):
        engine.backward(method(batch).mean())
        engine.step(1.0)
    # Each scored token is one of 350: by chance the loss is near 6.
    assert float(method(batch).detach().mean()) < 0.1


def test_saved_model_gives_the_same_loss_in_16_bits(tmp_path: Path) -> None:
    method = _method()
    prepared, pictures = _seen(method.backbone)
    with torch.no_grad():
        method.backbone.projector.linear_1.weight.mul_(2)
    method.save(tmp_path, {})
    found = load_backbone(tmp_path)
    ours = method(method.collate([LONG], prepared, None)).detach()
    # Weights of 11 bits: each is off by up to 1 part in 2,000, and so, about, is the loss.
    torch.testing.assert_close(_stock_loss(found, LONG, pictures), ours, rtol=5e-3, atol=5e-3)


def test_conversation_scores_the_tokens_of_the_turns_that_say_so() -> None:
    method = _method()
    batch = method.collate([_dense(SHORT)], _seen(method.backbone)[0], None)
    turns = episode_turns(SHORT)
    expected = [token for turn in turns[1:] for token in method.chat.turn(turn)[-1].ids]
    labels = batch.packed.labels_BL[0]
    assert labels[labels != NOT_SCORED].tolist() == expected
    assert batch.num_scored == len(expected) == 6

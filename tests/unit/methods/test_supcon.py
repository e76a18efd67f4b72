from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_core.config.model import SupConConfig
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.supcon import SupCon, SupConBatch, load_vision_tower
from tests.fakes import PlainEngine, draw_picture, pair_rows, tiny_backbone

CONCEPTS = [f"cat-{number}" for number in range(5)] + [f"cup-{number}" for number in range(5)]
STYLES = ("ink", "chalk", "oil", "clay", "wool")


def _method(**settings: Any) -> SupCon:
    torch.manual_seed(0)
    return SupCon(tiny_backbone(), SupConConfig(pairs_in_a_row=2, **settings))


def _rows() -> list[dict[str, Any]]:
    rows = pair_rows(CONCEPTS, STYLES)
    for number, row in enumerate(rows):
        row |= {"subcategory": row["concept"][:3], "pixels": _pixels()[number], "visit": number}
    return rows


@cache
def _pixels() -> list[Tensor]:
    """Of each picture, (1, 3, height, width)."""
    pictures = [draw_picture(number) for number in range(len(CONCEPTS) * len(STYLES))]
    return [prepared.inputs["pixel_values"] for prepared in tiny_backbone().prepare(pictures)]


def _states(method: SupCon, pixels: Tensor) -> Tensor:
    """What the tower's last layer gives, class token aside, (N, V, W)."""
    output = method.backbone.vision_tower(pixel_values=pixels, output_hidden_states=True)
    states: Tensor = output.hidden_states[-1][:, 1:]
    return states


def _pairs(order: list[int]) -> list[tuple[int, int]]:
    return list(zip(order[::2], order[1::2], strict=True))


def test_pairs_are_two_pictures_of_one_concept_and_no_picture_is_in_two() -> None:
    rows = _rows()
    for epoch in range(5):
        order = _method().epoch_order(rows, epoch, seed=0)
        assert len(set(order)) == len(order)
        assert all(rows[one]["concept"] == rows[other]["concept"] for one, other in _pairs(order))


def test_pairs_of_a_row_are_of_one_subcategory_but_where_two_groups_meet() -> None:
    rows = _rows()
    order = _method().epoch_order(rows, 0, seed=0)
    kinds = [rows[one]["subcategory"] for one, _ in _pairs(order)]
    runs = [kinds[start : start + 2] for start in range(0, len(kinds), 2)]
    assert sum(one != other for one, other in runs) <= 1
    assert len(runs) == 10


def test_order_is_a_function_of_seed_and_epoch() -> None:
    rows, method = _rows(), _method()
    assert method.epoch_order(rows, 3, seed=1) == _method().epoch_order(_rows(), 3, seed=1)
    orders = [method.epoch_order(rows, epoch, seed) for epoch in range(3) for seed in range(3)]
    assert all(one != other for one, other in pairwise(orders))


def test_every_picture_is_paired_in_some_epoch() -> None:
    rows, method = _rows(), _method()
    seen = {number for epoch in range(30) for number in method.epoch_order(rows, epoch, seed=0)}
    assert seen == set(range(len(rows)))


def test_a_visit_looks_the_same_in_every_run_and_different_at_the_next() -> None:
    rows = _rows()[:4]
    later = [row | {"visit": row["visit"] + 100} for row in rows]
    one, again, other = (_method().collate(batch, {}, None).pixels for batch in (rows, rows, later))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_loss_is_that_of_the_definition_written_out() -> None:
    method = _method(temperature=0.2)
    rows = _rows()
    batch = method.collate([rows[n] for n in (0, 1, 5, 6, 7, 10)], {}, None)
    with torch.no_grad():
        loss = method(batch)
        pooled = _states(method, batch.pixels).mean(1)
        z = F.normalize(method.head(pooled), dim=1)
    for i in range(6):
        partners = [p for p in range(6) if p != i and batch.concepts[p] == batch.concepts[i]]
        others = torch.stack([torch.exp(z[i] @ z[a] / 0.2) for a in range(6) if a != i]).sum()
        terms = [-torch.log(torch.exp(z[i] @ z[p] / 0.2) / others) for p in partners]
        expected = sum(terms) / len(terms) if terms else torch.tensor(0.0)
        # Cosines over 0.2 are at most 5; 32-bit exponentials of them keep six digits.
        torch.testing.assert_close(loss[i], torch.as_tensor(expected), atol=1e-4, rtol=1e-4)


def test_teacher_adds_the_distance_from_what_sets_pictures_apart() -> None:
    plain, taught = _method(), _method(teacher="somewhere", teacher_width=6, teacher_weight=3.0)
    plain.head.load_state_dict(taught.head.state_dict())
    batch = plain.collate(_rows()[:4], {}, None)
    features = torch.randn(4, 6) + 100
    with torch.no_grad():
        guess = taught.student(_states(taught, batch.pixels).mean(1))
        cosine = F.cosine_similarity(guess, features - features.mean(0), dim=1)
        both = taught(SupConBatch(batch.pixels, batch.concepts, features))
        # Sums of another order in 32 bits.
        torch.testing.assert_close(both, plain(batch) + 3 * (1 - cosine), atol=1e-4, rtol=1e-4)
    # What the teacher said of a picture is kept under the picture's key.
    said = {row["picture"]: one.numpy() for row, one in zip(_rows(), features, strict=False)}
    kept = taught.collate(_rows()[:4][::-1], {}, said).teacher
    assert kept is not None and torch.equal(kept, features.flip(0))


def test_gradient_reaches_the_tower_and_its_head_and_nothing_else() -> None:
    method = _method()
    method(method.collate(_rows()[:4], {}, None)).sum().backward()
    moved = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    # The last norm belongs to the class token, which is not read.
    unread = {name for name in method.trainable() if "post_layernorm" in name}
    assert moved == method.trainable().keys() - unread
    tower = {
        f"backbone.model.model.vision_tower.{n}" for n, _ in method.backbone.vision_tower.named_parameters()
    }
    assert method.trainable().keys() == tower | {f"head.{name}" for name, _ in method.head.named_parameters()}


def test_tower_learns_to_tell_a_batch_of_pairs_apart() -> None:
    method = _method()
    engine = PlainEngine(method, learning_rate=3e-3)
    rows = _rows()
    batch = method.collate([rows[number] for number in (0, 1, 5, 6, 10, 11, 25, 26)], {}, None)
    first = float(method(batch).detach().mean())
    for _ in range(40):
        engine.backward(method(batch).mean())
        engine.step(1.0)
    # By chance the loss is log 7 = 1.9.
    assert first > 1 > 0.3 > float(method(batch).detach().mean())


def test_saved_tower_goes_into_another_backbone(tmp_path: Path) -> None:
    method = _method()
    method.save(tmp_path, {})
    backbone = tiny_backbone(seed=5)
    prepared = backbone.prepare([draw_picture(0)])
    trained = method.backbone.vision.tower_states(prepared)[0]
    assert not torch.equal(backbone.vision.tower_states(prepared)[0], trained)
    load_vision_tower(tmp_path, backbone)
    assert torch.equal(backbone.vision.tower_states(prepared)[0], trained)


def test_tower_that_is_missing_torn_or_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no vision tower"):
        load_vision_tower(tmp_path, tiny_backbone())
    _method().save(tmp_path, {})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_vision_tower(tmp_path, tiny_backbone(width=64))
    path = tmp_path / "vision_tower.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_vision_tower(tmp_path, tiny_backbone())

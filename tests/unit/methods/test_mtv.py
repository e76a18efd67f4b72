from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from mmicl_core.backbones.decoding import Decoding, generate
from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.model import MtvConfig
from mmicl_core.errors import DataError
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Plain
from mmicl_core.methods.mtv import Mtv, select_heads
from tests.fakes import draw_picture, episode_row, random_pictures, tiny_backbone
from tests.families import write_model

KEYS = [f"p{number}" for number in range(6)]
# 32-bit sums in another order differ in the last bits; scores and losses are of the order of 1.
LAST_BITS = {"atol": 2e-5, "rtol": 1e-4}
ROWS = [
    episode_row(["p0", "p1", "p2"], ["bako", "mute", "bako"]),
    episode_row(["p2", "p3", "p4"], ["sidu", "goma", "goma"], "This is surely"),
    episode_row(["p5", "p1"], ["sidu", "sidu"]),
    episode_row(["p4", "p5", "p0"], ["mute", "bako", "mute"], "This"),
]
FAMILIES = ["llava", "qwen2_5_vl", "blip_2_t5"]


@cache
def _backbone(name):
    with tempfile.TemporaryDirectory() as folder:
        write_model(name, Path(folder))
        return load_backbone(Path(folder))


def _method(backbone=None, **settings):
    few = {"prompts": 2, "shots": 2, "steps": 4, "samples": 4, "batch": 3}
    return Mtv(backbone or tiny_backbone(), MtvConfig(**few | settings))


def _drawn(backbone):
    return dict(zip(KEYS, backbone.prepare([draw_picture(n) for n in range(len(KEYS))]), strict=True))


def _fill(method, seed=0):
    """Means that are no activations, in half of the heads."""
    generator = torch.Generator().manual_seed(seed)
    method.means_KHE.copy_(torch.randn(method.means_KHE.shape, generator=generator))
    method.selected_KH.copy_(torch.arange(method.selected_KH.numel()).view_as(method.selected_KH) % 2)
    return method


def _unanswered(row):
    return row | {"turns": [*row["turns"][:-1], row["turns"][-1] | {"answer": None}]}


def _scores(method, rows, pictures):
    prompts = method.embed(method.collate([_unanswered(row) for row in rows], pictures, None, "left"))
    with method.applied(prompts):
        return Decoding(method.backbone, prompts).scores_BV


@pytest.mark.parametrize("name", FAMILIES)
def test_means_of_one_prompt_in_all_heads_give_its_scores_to_its_query_alone(name):
    backbone = _backbone(name)
    pictures = _drawn(backbone)
    method = _method(backbone, prompts=1)
    # The held-back row is of other shots, so it is known which one the means are of.
    method.fit([ROWS[0], ROWS[2]], pictures, seed=0)
    method.selected_KH.fill_(1)
    plain = Plain(backbone)
    shown = plain.collate([_unanswered(ROWS[0])], pictures, None, "left")
    with_demonstrations = Decoding(backbone, plain.embed(shown)).scores_BV
    torch.testing.assert_close(_scores(method, ROWS[:1], pictures), with_demonstrations, **LAST_BITS)
    method.selected_KH.fill_(0)
    assert (_scores(method, ROWS[:1], pictures) - with_demonstrations).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_likelihood_of_an_answer_is_that_of_its_tokens_while_they_are_generated(name):
    backbone = _backbone(name)
    pictures = _drawn(backbone)
    method = _fill(_method(backbone))
    batch = method.collate(ROWS[:1], pictures, None)
    answer = batch.packed.labels_BL[batch.packed.answer_BL]
    prompts = method.embed(method.collate([_unanswered(ROWS[0])], pictures, None, "left"))
    nll = []
    with method.applied(prompts):
        decoding = Decoding(backbone, prompts)
        for token in answer:
            nll.append(-decoding.scores_BV.log_softmax(-1)[0, token])
            decoding.feed(token[None])
    assert len(nll) > 1
    torch.testing.assert_close(method(batch), torch.stack(nll), **LAST_BITS)


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_of_two_queries_is_answered_as_each_alone(name):
    backbone = _backbone(name)
    pictures = _drawn(backbone)
    method = _fill(_method(backbone))
    apart = [_scores(method, [row], pictures) for row in ROWS[:2]]
    torch.testing.assert_close(_scores(method, ROWS[:2], pictures), torch.cat(apart), **LAST_BITS)
    apart = [method(method.collate([row], pictures, None)) for row in ROWS[:2]]
    together = method(method.collate(ROWS[:2], pictures, None))
    torch.testing.assert_close(together, torch.cat(apart), **LAST_BITS)


def test_method_that_was_never_fitted_answers_the_query_as_the_plain_model():
    method = _method()
    pictures = random_pictures(KEYS, method.backbone)
    query = ROWS[0] | {"turns": ROWS[0]["turns"][-1:]}
    plain = Plain(method.backbone)
    expected = plain(plain.collate([query], pictures, None))
    assert torch.equal(method(method.collate(ROWS[:1], pictures, None)), expected)


def test_means_are_over_so_many_episodes_of_so_many_shots_in_any_batch():
    backbone = tiny_backbone()
    pictures = random_pictures(KEYS, backbone)
    # Two rows have two demonstrations, so the means are of both, whatever the seed.
    rows = [ROWS[0], ROWS[2], ROWS[1]]
    one_by_one, together = _method(backbone, batch=1), _method(backbone, batch=3)
    one_by_one.fit(rows, pictures, seed=0)
    together.fit(rows, pictures, seed=1)
    single = []
    for row in (ROWS[0], ROWS[1]):
        method = _method(backbone, prompts=1)
        method.fit([row, ROWS[2]], pictures, seed=0)
        single.append(method.means_KHE)
    assert (single[0] - single[1]).abs().max() > 1e-2
    torch.testing.assert_close(one_by_one.means_KHE.data, torch.stack(single).mean(0), **LAST_BITS)
    torch.testing.assert_close(together.means_KHE.data, torch.stack(single).mean(0), **LAST_BITS)


def test_means_end_at_the_query_even_where_demonstrations_are_scored_too():
    method = _method(prompts=1)
    pictures = random_pictures(KEYS, method.backbone)
    method.fit([ROWS[0], ROWS[2]], pictures, seed=0)
    expected = method.means_KHE.clone()
    dense = ROWS[0] | {"turns": [turn | {"scored": True} for turn in ROWS[0]["turns"]]}
    method.fit([dense, ROWS[2]], pictures, seed=0)
    assert torch.equal(method.means_KHE, expected)


def test_fit_tells_the_loss_of_first_tokens_with_and_without_the_heads_it_selected():
    method = _method(steps=20, samples=8)
    pictures = random_pictures(KEYS, method.backbone)
    steps = []
    told = method.fit([ROWS[0], ROWS[2], ROWS[1]], pictures, seed=0, progress=steps.append)
    query = method.collate([ROWS[2]], pictures, None)
    assert told["loss"] == pytest.approx(float(method(query)[0]), rel=1e-4)
    assert told["loss_without"] == pytest.approx(float(_method()(query)[0]), rel=1e-4)
    # There are 16 sets of four heads, and 160 were tried for a single query.
    assert told["loss"] < told["loss_without"]
    assert (told["heads"], told["selected"]) == (4, int(method.selected_KH.sum()))
    assert steps == list(range(1, 21))


def test_fit_depends_on_its_seed_alone():
    backbone = tiny_backbone()
    pictures = random_pictures(KEYS, backbone)
    methods = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(methods))
        method = _method(backbone)
        told = method.fit(ROWS, pictures, seed=seed)
        methods.append((method.means_KHE, method.selected_KH, told))
    assert torch.equal(methods[0][0], methods[1][0])
    assert torch.equal(methods[0][1], methods[1][1])
    assert methods[0][2] == methods[1][2]
    assert not torch.equal(methods[0][0], methods[2][0])


def test_fit_refuses_too_few_episodes_and_says_how_many_there_are():
    method = _method(prompts=3)
    pictures = random_pictures(KEYS, method.backbone)
    with pytest.raises(DataError, match=r"method\.prompts \(3\).*shots \(2\).*of 3 episodes 2 are such"):
        method.fit(ROWS[:3], pictures, seed=0)
    with pytest.raises(DataError, match="more for the search"):
        _method(prompts=3).fit([ROWS[0], ROWS[1], ROWS[3]], pictures, seed=0)


@pytest.mark.parametrize("name", ["llava", "blip_2_t5"])
def test_other_uses_of_the_backbone_are_undisturbed_by_fitting_and_answering(name):
    backbone = _backbone(name)
    pictures = _drawn(backbone)
    plain = Plain(backbone)
    batch = plain.collate(ROWS[:1], pictures, None)
    before = plain(batch)
    method = _method(backbone)
    method.fit(ROWS, pictures, seed=0)
    method.selected_KH.fill_(1)
    assert torch.equal(plain(batch), before)
    alone = method.collate([_unanswered(ROWS[0])], pictures, None, "left")
    prompts = method.embed(alone)
    with method.applied(prompts):
        generate(backbone, prompts, 3)
    assert torch.equal(plain(batch), before)
    assert not any(parameter.requires_grad for parameter in method.parameters())


def test_saved_means_and_heads_answer_as_before_and_are_all_that_is_saved(tmp_path):
    method = _fill(_method())
    pictures = random_pictures(KEYS, method.backbone)
    method.save(tmp_path, {})
    loaded, started = _method(), _method(start=str(tmp_path))
    load_parameters(loaded, tmp_path)
    batch = method.collate(ROWS[:2], pictures, None)
    for other in (loaded, started):
        assert torch.equal(other(batch), method(batch))
    assert set(method.trainable()) == {"means_KHE", "selected_KH"}
    assert not torch.equal(_method()(batch), method(batch))


PLANTED = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])


def _planted_losses(chosen_SKH, query):
    """Every planted head helps, every other one harms a little, and queries are of different difficulty."""
    worth = torch.where(PLANTED == 1, 1.0, -0.5)
    return 100.0 * query - (chosen_SKH * worth).sum((1, 2))


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(3))
def test_search_finds_the_planted_heads_and_no_other(seed):
    config = MtvConfig(steps=300)
    assert torch.equal(select_heads(_planted_losses, 5, (3, 4), config, _generator(seed)), PLANTED)


def test_search_begins_with_about_a_quarter_of_the_heads_and_learns_what_helps_in_its_first_steps():
    shares = []

    def losses_of(chosen_SKH, query):
        shares.append((chosen_SKH.mean((0, 1, 2)), chosen_SKH[:, PLANTED == 1].mean()))
        return _planted_losses(chosen_SKH, query)

    select_heads(losses_of, 5, (3, 4), MtvConfig(steps=30, samples=512), _generator())
    # sigmoid(-1) is 0.269; of 6144 draws the share has a standard deviation of 0.006.
    assert float(shares[0][0]) == pytest.approx(0.269, abs=0.02)
    # Adam moves a logit by at most 0.1 in its first steps: sigmoid(-1 + 29 * 0.1) is 0.87.
    assert 0.7 < float(shares[29][1]) < 0.9


def test_search_hears_every_query_alike_however_large_its_losses():
    drawn = []

    def losses_of(chosen_SKH, query):
        drawn.append(chosen_SKH.mean(0))
        # One query of five wants the opposite, and a hundred times as much.
        return _planted_losses(chosen_SKH, query) * (-100 if query == 0 else 1)

    select_heads(losses_of, 5, (3, 4), MtvConfig(steps=300), _generator())
    last = torch.stack(drawn[250:300]).mean(0)
    assert last[PLANTED == 1].mean() > 0.8
    assert last[PLANTED == 0].mean() < 0.2


def test_search_ends_with_the_best_of_ten_sets_over_at_most_fifty_queries():
    judged = {}

    def losses_of(chosen_SKH, query):
        losses_S = _planted_losses(chosen_SKH, query) + torch.randn(len(chosen_SKH), generator=noise)
        if len(chosen_SKH) == 10:
            judged[query] = (chosen_SKH, losses_S)
        return losses_S

    noise = _generator(1)
    selected_KH = select_heads(losses_of, 60, (3, 4), MtvConfig(steps=1), _generator())
    assert sorted(judged) == list(range(50))
    (candidates, _), mean_S = judged[0], torch.stack([losses for _, losses in judged.values()]).mean(0)
    assert len(torch.unique(candidates, dim=0)) > 1
    assert torch.equal(selected_KH, candidates[mean_S.argmin()])


def test_no_gradient_is_needed_to_search():
    with torch.no_grad():
        found = select_heads(_planted_losses, 5, (3, 4), MtvConfig(steps=300), _generator())
    assert torch.equal(found, PLANTED)

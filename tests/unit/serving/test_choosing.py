"""Tokens are drawn as often as the model finds them likely, by their own seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mmicl_core.serving.choosing import FEW, choose, likelihood
from mmicl_core.serving.sampling import Sampling

SCORES_V = torch.tensor([0.1, 2.0, 1.0, -3.0, 1.5])


def drawn(**more: float) -> Counter[int]:
    samplings = [Sampling(1, seed=seed, **more) for seed in range(4000)]
    return Counter(choose(SCORES_V.expand(4000, -1), samplings, [0] * 4000))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    expected = (SCORES_V / temperature).softmax(-1)
    counts = drawn(temperature=temperature)
    for token, share in enumerate(expected.tolist()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_nucleus_is_drawn_from_alone_in_its_own_proportions() -> None:
    shares = SCORES_V.softmax(-1)
    # The likeliest two make 0.70, and reach 0.6 together.
    counts = drawn(temperature=1.0, top_p=0.6)
    assert set(counts) == {1, 4}
    assert counts[1] / 4000 == pytest.approx(float(shares[1] / (shares[1] + shares[4])), abs=0.03)


@pytest.mark.parametrize(
    "more", [{"temperature": 0}, {"temperature": 1e-300}, {"temperature": 2.0, "top_p": 0}]
)
def test_likeliest_token_is_taken_at_no_temperature_and_from_the_smallest_nucleus(
    more: dict[str, float],
) -> None:
    assert set(drawn(**more)) == {1}


def test_nucleus_of_more_than_a_few_tokens_is_whole() -> None:
    scores = torch.zeros(1, 4 * FEW)
    samplings = [Sampling(1, seed=seed, temperature=1.0, top_p=0.75) for seed in range(3000)]
    tokens = choose(scores.expand(3000, -1), samplings, [0] * 3000)
    assert max(tokens) == pytest.approx(3 * FEW, abs=9) and len(set(tokens)) > 2 * FEW


def test_draws_depend_on_seed_and_place_and_on_nothing_beside() -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    samplings = [
        Sampling(9),
        Sampling(9, temperature=1.0, seed=3),
        Sampling(9, temperature=1.0, seed=3, top_p=0.7),
        Sampling(9, temperature=0.3, seed=4, top_p=0.9),
        Sampling(9, temperature=2.0, seed=2**63),
        Sampling(9, temperature=1.0, seed=3),
    ]
    counts = [0, 1, 1, 5, 2, 2]
    together = choose(scores, samplings, counts)
    alone = [choose(scores[row : row + 1], [samplings[row]], [counts[row]])[0] for row in range(6)]
    assert together == alone
    same = scores[:1].expand(40, -1)
    first = choose(same, [samplings[1]] * 40, list(range(40)))
    assert len(set(first)) > 5 and first == choose(same, [samplings[1]] * 40, list(range(40)))


def test_likelihood_of_a_token_is_that_of_the_scores() -> None:
    told = likelihood(SCORES_V, 2, 3)
    expected = SCORES_V.log_softmax(-1)
    assert told.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in told.likeliest] == [1, 4, 2]
    assert [value for _, value in told.likeliest] == pytest.approx(expected[[1, 4, 2]].tolist())
    assert likelihood(SCORES_V, 2, 0).likeliest == ()

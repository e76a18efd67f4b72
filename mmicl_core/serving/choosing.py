"""The next token of an answer: the likeliest one, or one that is drawn; how likely it was.

    scores (V) --temperature--> probabilities --nucleus (Holtzman et al. 2020, arXiv:1904.09751)--> draw

A draw depends on the seed of its own answer and on how many tokens that has, and on nothing that is answered
at the same time: an answer that is begun again goes on as before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mmicl_core.serving.sampling import Likelihood, Sampling

__all__ = ["choose", "likelihood"]

FEW = 256


def choose(scores_BV: Tensor, samplings: Sequence[Sampling], counts: Sequence[int]) -> list[int]:
    """The next token of each answer.

    Args:
        counts: tokens that each answer has so far.
    """
    chosen: list[int] = scores_BV.argmax(-1).tolist()
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not rows:
        return chosen
    # In 64 bits: the sums of a large vocabulary would come out differently in 32.
    shares_BV = _probabilities(scores_BV[rows], [samplings[row] for row in rows])
    points_B1 = _column([_point(samplings[row].seed, counts[row]) for row in rows], shares_BV)
    for place, (row, token) in enumerate(zip(rows, _draw(shares_BV, points_B1), strict=True)):
        chosen[row], one, top_p = token, slice(place, place + 1), samplings[row].top_p
        if top_p < 1:
            chosen[row] = _draw_from_nucleus(shares_BV[one], top_p, points_B1[one])
    return chosen


def likelihood(scores_V: Tensor, token: int, count: int) -> Likelihood:
    """How likely a token was among all, with the `count` likeliest ones."""
    logprobs_V = scores_V.float().log_softmax(-1)
    most = logprobs_V.topk(count) if count else None
    told = tuple(zip(most.indices.tolist(), most.values.tolist(), strict=True)) if most is not None else ()
    return Likelihood(token, float(logprobs_V[token]), told)


def _probabilities(scores_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    # The likeliest one at 0: however low the temperature is, nothing overflows.
    scores_BV = scores_BV.double() - scores_BV.amax(-1, keepdim=True)
    temperatures_B1 = _column([sampling.temperature for sampling in samplings], scores_BV)
    return (scores_BV / temperatures_B1).softmax(-1)


def _draw(shares_BV: Tensor, points_B1: Tensor) -> list[int]:
    """Of shares side by side, the one in which each point lies."""
    ends_BV = shares_BV.cumsum(-1)
    places_B1 = torch.searchsorted(ends_BV, points_B1 * ends_BV[:, -1:], right=True)
    drawn: list[int] = places_B1[:, 0].clamp(max=shares_BV.shape[1] - 1).tolist()
    return drawn


def _draw_from_nucleus(shares_1V: Tensor, top_p: float, points_B1: Tensor) -> int:
    # The few likeliest hold nearly every nucleus, and to sort a whole vocabulary takes longer than a layer.
    ordered_1V, ids_1V = shares_1V.topk(min(FEW, shares_1V.shape[1]))
    if float(ordered_1V.sum()) < top_p:
        ordered_1V, ids_1V = shares_1V.sort(descending=True, stable=True)
    outside_1V = ordered_1V.cumsum(-1) - ordered_1V >= top_p
    # However small the nucleus is, the likeliest one is in it.
    outside_1V[:, 0] = False
    (place,) = _draw(ordered_1V.masked_fill(outside_1V, 0), points_B1)
    return int(ids_1V[0, place])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _point(seed: int, count: int) -> float:
    """Between 0 and 1, another one for each token of an answer; neighbouring seeds share none."""
    return random.Random(f"{seed}/{count}").random()

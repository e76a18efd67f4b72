"""The next token of an answer: the likeliest one, or one that is drawn; how likely it was.

    scores (V) --temperature--> probabilities --nucleus (Holtzman et al. 2020, arXiv:1904.09751)--> draw

A draw depends on the seed of its own answer and on how many tokens that has, and on nothing that is answered
at the same time: an answer that is begun again goes on as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmicl_core.serving.sampling import Likelihood, Sampling

__all__ = ["choose", "likelihood"]


def choose(scores_BV: Tensor, samplings: Sequence[Sampling], counts: Sequence[int]) -> list[int]:
    """The next token of each answer.

    Args:
        counts: tokens that each answer has so far.
    """
    chosen: list[int] = scores_BV.argmax(-1).tolist()
    for row, (sampling, count) in enumerate(zip(samplings, counts, strict=True)):
        if sampling.temperature > 0:
            chosen[row] = _draw(scores_BV[row], sampling, count)
    return chosen


def likelihood(scores_V: Tensor, token: int, count: int) -> Likelihood:
    """How likely a token was among all, with the `count` likeliest ones."""
    logprobs_V = scores_V.float().log_softmax(-1)
    most = logprobs_V.topk(count) if count else None
    told = tuple(zip(most.indices.tolist(), most.values.tolist(), strict=True)) if most is not None else ()
    return Likelihood(token, float(logprobs_V[token]), told)


def _draw(scores_V: Tensor, sampling: Sampling, count: int) -> int:
    # In 64 bits on the CPU: the draw is the same on every device.
    scores_V = scores_V.double().cpu()
    # The likeliest one at 0: however low the temperature is, nothing overflows.
    probabilities_V = ((scores_V - scores_V.max()) / sampling.temperature).softmax(-1)
    ordered_V, ids_V = probabilities_V.sort(descending=True, stable=True)
    before_V = ordered_V.cumsum(0) - ordered_V
    # However small the share is, the likeliest one is in it.
    ordered_V[1:] = ordered_V[1:].masked_fill(before_V[1:] >= sampling.top_p, 0)
    generator = torch.Generator().manual_seed(_mix(sampling.seed, count))
    return int(ids_V[torch.multinomial(ordered_V, 1, generator=generator)])


def _mix(seed: int, count: int) -> int:
    """A seed for each token of an answer; neighbouring seeds share none."""
    return (seed * 0x9E3779B97F4A7C15 + count * 0xBF58476D1CE4E5B9) % 2**63

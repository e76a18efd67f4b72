"""Decoding, greedy or by beams: whole answers of a batch, or one answer token by token while it grows.

The keys and values of a prompt are computed once; each step then costs one position. Positions are counted
on from the prompt's own last one, which in prompts with pictures need not be their length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from mmicl_core.backbones.caches import changed, keeps_all, side_by_side, with_room
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.errors import BackboneError

__all__ = [
    "Decoding",
    "can_pad_behind",
    "context_length",
    "generate",
    "generate_by_beams",
    "greedy_tokens",
]

NO_LIMIT = 1 << 20


def context_length(backbone: HuggingFaceBackbone) -> int:
    """Most positions of a prompt and its answer together."""
    return int(getattr(backbone.text_config, "max_position_embeddings", None) or NO_LIMIT)


def generate(
    backbone: HuggingFaceBackbone, prompts: Embedded, max_new_tokens: int, cache: Any = None
) -> list[list[int]]:
    """Greedy continuation of left-padded prompts; ids before the end token. `cache` as in `Decoding`."""
    decoding = Decoding(backbone, prompts, cache)
    end = backbone.tokenizer.eos_token_id
    answers: list[list[int]] = [[] for _ in prompts.mask_BL]
    growing, ended = list(range(len(answers))), set[int]()
    for left in reversed(range(max_new_tokens)):
        ids_B = decoding.scores_BV.argmax(-1)
        for place, token in zip(growing, ids_B.tolist(), strict=True):
            if token == end:
                ended.add(place)
            elif place not in ended:
                answers[place].append(token)
        rows = [row for row, place in enumerate(growing) if place not in ended]
        if not rows or not left:
            break
        # Fewer rows are copied only where that saves more than it costs.
        if 2 * len(rows) <= len(growing):
            growing = [growing[row] for row in rows]
            decoding.keep(rows)
            ids_B = ids_B[rows]
        decoding.feed(ids_B)
    return answers


def generate_by_beams(
    backbone: HuggingFaceBackbone, prompts: Embedded, max_new_tokens: int, beams: int
) -> list[list[int]]:
    """The likeliest answers that beam search finds, by the sum of their log-probabilities, as OpenFlamingo's
    evaluation does with a length penalty of 0; ids before the end token of left-padded prompts.

    An answer that was cut stands for itself. A search goes on until no answer that still grows can overtake
    those that ended: a sum only falls.
    """
    decoding, count = Decoding(backbone, prompts), len(prompts.mask_BL)
    decoding.keep([row for row in range(count) for _ in range(beams)])
    end = backbone.tokenizer.eos_token_id
    # All beams of a prompt begin alike: all but one are ruled out until they differ.
    sums_BW = torch.full((count, beams), -torch.inf, device=decoding.scores_BV.device)
    sums_BW[:, 0] = 0
    grown: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(count)]
    best = [(-math.inf, list[int]()) for _ in range(count)]
    for left in reversed(range(max_new_tokens)):
        scores_BWV = F.log_softmax(decoding.scores_BV.float(), -1).reshape(count, beams, -1)
        totals_BWV = sums_BW[..., None] + scores_BWV
        # An end counts where it is among the best of its step, as in transformers' search.
        least_B1 = totals_BWV.flatten(1).topk(beams).values[:, -1:]
        ends_BW = totals_BWV[..., end].masked_fill(totals_BWV[..., end] < least_B1, -torch.inf)
        for row, ended in enumerate(ends_BW.tolist()):
            best[row] = max([best[row], *zip(ended, grown[row], strict=True)], key=itemgetter(0))
        totals_BWV[..., end] = -torch.inf
        sums_BW, chosen_BW = totals_BWV.flatten(1).topk(beams)
        from_BW, ids_BW = chosen_BW // totals_BWV.shape[-1], chosen_BW % totals_BWV.shape[-1]
        grown = [
            [[*answers[beam], token] for beam, token in zip(beams_of, tokens, strict=True)]
            for answers, beams_of, tokens in zip(grown, from_BW.tolist(), ids_BW.tolist(), strict=True)
        ]
        if not left or all(one[0] >= told for one, told in zip(best, sums_BW[:, 0].tolist(), strict=True)):
            break
        first_B1 = beams * torch.arange(count, device=from_BW.device)[:, None]
        decoding.keep((first_B1 + from_BW).flatten().tolist())
        decoding.feed(ids_BW.flatten())
    cut = zip(sums_BW[:, 0].tolist(), (answers[0] for answers in grown), strict=True)
    return [max(ended, other, key=itemgetter(0))[1] for ended, other in zip(best, cut, strict=True)]


def greedy_tokens(
    backbone: HuggingFaceBackbone, prompt: Embedded, max_new_tokens: int, cache: Any = None
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, each as soon as it is chosen; ends before the end token."""
    decoding = Decoding(backbone, prompt, cache)
    for left in reversed(range(max_new_tokens)):
        token_B = decoding.scores_BV.argmax(-1)
        token = int(token_B[0])
        if token == backbone.tokenizer.eos_token_id:
            return
        yield token
        if left:
            decoding.feed(token_B)


class Decoding:
    """Prompts whose answers grow by one token at a time.

    Args:
        prompts: left-padded.
        cache: keys and values of what stands before the prompts, as the language model gave them: one row for
            every prompt, or one for all. It is not changed, and can be used again.

    Raises:
        BackboneError: the model looks at the last tokens only, and between the cache and some of the prompts
            stands padding, which would count among them.
    """

    scores_BV: Tensor
    """Scores of the next token of each."""

    @torch.no_grad()
    def __init__(self, backbone: HuggingFaceBackbone, prompts: Embedded, cache: Any = None) -> None:
        self._backbone = backbone
        before = cache.get_seq_length() if cache is not None else 0
        self._mask_BL = prompts.mask_behind(before)
        self._next_B = prompts.last_positions() + 1 + before
        self._axes = prompts.positions.shape[:-2]
        self._encoded: Tensor | None = None
        if backbone.family.decoder is not None:
            self._encoded = backbone.read(prompts).last_hidden_state
            self._cache: Any = None
            start = backbone.text_config.decoder_start_token_id
            self._answer(torch.full_like(self._next_B, start))
            return
        output = backbone.read(prompts, use_cache=True, past_key_values=_copy_for(prompts, cache))
        self._cache = with_room(output.past_key_values)
        self.scores_BV = backbone.logits(output.last_hidden_state[:, -1])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these alone, in this order; one that is named twice goes on twice."""
        at = torch.tensor(rows, device=self._mask_BL.device)
        self._mask_BL, self._next_B = self._mask_BL[at], self._next_B[at]
        self.scores_BV = self.scores_BV[at]
        if self._encoded is not None:
            self._encoded = self._encoded[at]
        self._cache.batch_select_indices(at)
        if rows and self.can_join:
            self._drop_padding()

    @property
    def can_join(self) -> bool:
        """Whether others may be added: models that keep all keys and values, by column, and nothing else."""
        return self._encoded is None and keeps_all(self._cache)

    def join(self, other: Decoding) -> None:
        """Go on with the rows of both, those of `other` behind; it must not be used any more."""
        width = max(self._mask_BL.shape[1], other._mask_BL.shape[1])
        parts = (self, other)
        masks = [F.pad(part._mask_BL, (width - part._mask_BL.shape[1], 0)) for part in parts]
        self._mask_BL = torch.cat(masks)
        self._next_B = torch.cat([part._next_B for part in parts])
        self.scores_BV = torch.cat([part.scores_BV for part in parts])
        self._cache = side_by_side([self._cache, other._cache], width)

    @torch.no_grad()
    def feed(self, ids_B: Tensor) -> None:
        """Go on behind these tokens."""
        if self._encoded is not None:
            self._answer(ids_B)
            return
        self._mask_BL = torch.cat([self._mask_BL, torch.ones_like(self._mask_BL[:, :1])], dim=1)
        output = self._backbone.language_model(
            inputs_embeds=self._backbone.model.get_input_embeddings()(ids_B[:, None]),
            attention_mask=self._mask_BL,
            position_ids=self._next_B[:, None].expand(*self._axes, -1, -1),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._next_B = self._next_B + 1
        self.scores_BV = self._backbone.logits(output.last_hidden_state[:, -1])

    def _drop_padding(self) -> None:
        """Forget columns in which nobody has a token any more."""
        empty = int((self._mask_BL.cumsum(1).amax(0) == 0).sum())
        if empty:
            self._mask_BL = self._mask_BL[:, empty:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[..., empty:, :], layer.values[..., empty:, :]

    def _answer(self, ids_B: Tensor) -> None:
        assert self._encoded is not None
        output = self._backbone.decode(
            self._encoded, self._mask_BL, ids_B[:, None], past_key_values=self._cache, use_cache=True
        )
        self._cache = output.past_key_values
        self.scores_BV = output.logits[:, -1]


def _copy_for(prompts: Embedded, cache: Any) -> Any:
    if cache is None:
        return None
    if any(cache.is_sliding) and not prompts.mask_BL.all():
        lengths = sorted(set(prompts.mask_BL.sum(1).tolist()))
        raise BackboneError(
            f"prompts of {lengths} tokens stand behind one cache, but the model has layers that look at the "
            "last tokens only: give it prompts of one length at a time"
        )
    return changed(cache, lambda rows_BHLE: rows_BHLE.expand(len(prompts.mask_BL), -1, -1, -1))


def can_pad_behind(backbone: HuggingFaceBackbone) -> bool:
    """Whether padding may stand between what is known and a prompt: not where layers look at the last columns
    only, among which it would count."""
    return keeps_all(DynamicCache(config=backbone.language_model.config))

"""Greedy decoding: whole answers of a batch, or one answer token by token while it grows.

The keys and values of a prompt are computed once; each step then costs one position. Positions are counted
on from the prompt's own last one, which in prompts with pictures need not be their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.errors import BackboneError

__all__ = ["Decoding", "context_length", "generate", "greedy_tokens"]

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
    chosen: list[Tensor] = []
    ended = torch.zeros(len(prompts.mask_BL), dtype=torch.bool, device=prompts.mask_BL.device)
    while len(chosen) < max_new_tokens:
        ids_B = decoding.scores_BV.argmax(-1)
        chosen.append(ids_B)
        ended = ended | (ids_B == end)
        if ended.all() or len(chosen) == max_new_tokens:
            break
        decoding.feed(ids_B)
    answers = [row.tolist() for row in torch.stack(chosen, dim=1)]
    return [ids[: ids.index(end)] if end in ids else ids for ids in answers]


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
        cache: keys and values of what stands before every prompt, as the language model gave them for a batch
            of one. It is copied, and can be used again.

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
        self._mask_BL = F.pad(prompts.mask_BL, (before, 0), value=1)
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
        self._cache = output.past_key_values
        self.scores_BV = backbone.logits(output.last_hidden_state[:, -1])

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
    copied = deepcopy(cache)
    copied.batch_repeat_interleave(len(prompts.mask_BL))
    return copied

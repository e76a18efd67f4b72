"""Greedy decoding one token at a time, for answers that are shown while they grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone

__all__ = ["context_length", "greedy_tokens"]


def context_length(backbone: HuggingFaceBackbone) -> int:
    """Most positions of a prompt and its answer together."""
    return int(backbone.model.config.text_config.max_position_embeddings)


def greedy_tokens(backbone: HuggingFaceBackbone, embeds_LD: Tensor, max_new_tokens: int) -> Iterator[int]:
    """The tokens of `Backbone.generate` for one prompt (L, D), each as soon as it is chosen.

    Ends before the end token. The keys and values of the prompt are kept between steps, so that a step
    costs one position.
    """
    cache = None
    end = backbone.tokenizer.eos_token_id
    embeds_BLD = embeds_LD[None]
    for _ in range(max_new_tokens):
        token, cache = _choose(backbone, embeds_BLD, cache)
        if token == end:
            return
        yield token
        embeds_BLD = backbone.embed(torch.tensor([[token]], device=backbone.device))


@torch.no_grad()
def _choose(backbone: HuggingFaceBackbone, embeds_BLD: Tensor, cache: Any) -> tuple[int, Any]:
    output = backbone.language_model(inputs_embeds=embeds_BLD, past_key_values=cache, use_cache=True)
    scores = backbone.logits(output.last_hidden_state[0, -1])
    return int(scores.argmax()), output.past_key_values

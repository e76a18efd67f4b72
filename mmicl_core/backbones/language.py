"""The side of a model that reads: prompts of text, visual tokens and fused tokens -> hidden states, scores.

Where pictures and fused tokens lie is known from how a prompt was packed, and is never looked for among ids
or embeddings: no text, and no fused token, can pass for a picture. What a family does with pictures beside
reading their tokens (positions in rows and columns, attention to all of a picture, features of earlier
vision layers) is computed here as its own `forward` does.

Shapes (letters in `mmicl_core.shapes`): K layers of the language model may take features of pictures too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from mmicl_core.data.collate import Packed

__all__ = ["Embedded", "embed", "language_inputs", "positions_of"]


@dataclass(frozen=True)
class Embedded:
    """Prompts as a language model takes them, (B, L)."""

    embeds_BLD: Tensor
    mask_BL: Tensor
    """1 where there is a token."""
    image_BL: Tensor
    """True at visual tokens."""
    answer_BL: Tensor
    """True at tokens that the loss counts."""
    positions: Tensor
    """(B, L), or (3, B, L) for frames, rows and columns."""
    soft_BL: Tensor | None = None
    """True at soft tokens put before the prompts, if any."""
    deep: tuple[Tensor, ...] = ()
    """Of all pictures, what the first K layers add at visual tokens, (sum of V, D) each."""
    soft_KSD: Tensor | None = None
    """What takes the place of the S soft tokens at the entrance of each layer but the first, if anything."""
    before_BP: Tensor | None = None
    """1 where the P columns before, of which keys and values are known, hold a token; None where all do."""

    def after(self, soft_SD: Tensor, later_KSD: Tensor | None = None) -> Embedded:
        """The same prompts, each right after S soft tokens, which stand at positions 0 to S - 1.

        Padding on the left stays on the left of them: what tells distances by columns (relative positions of
        T5, sliding windows) shall find no hole between.

        Args:
            later_KSD: what takes their place at the entrance of each layer but the first.
        """
        batch, count = len(self.embeds_BLD), len(soft_SD)
        length = count + self.embeds_BLD.shape[1]
        padding_B1 = (self.mask_BL.cumsum(1) == 0).sum(1, keepdim=True)
        columns = torch.arange(length, device=self.mask_BL.device).expand(batch, -1)
        soft_BL = (columns >= padding_B1) & (columns < padding_B1 + count)
        # Every column's source, counted with the soft tokens first.
        source = torch.where(columns < padding_B1, columns + count, columns)
        source = torch.where(soft_BL, columns - padding_B1, source)

        def widen(rows: Tensor, fill: int) -> Tensor:
            return F.pad(rows, (count, 0), value=fill).gather(-1, source.expand(*rows.shape[:-1], -1))

        soft = soft_SD.to(self.embeds_BLD.dtype).expand(batch, -1, -1)
        embeds = torch.cat([soft, self.embeds_BLD], dim=1)
        counted = torch.where(soft_BL, columns - padding_B1, widen(self.positions, 0) + count)
        return replace(
            self,
            embeds_BLD=embeds.gather(1, source[..., None].expand_as(embeds)),
            mask_BL=widen(self.mask_BL, 1),
            image_BL=widen(self.image_BL, 0),
            answer_BL=widen(self.answer_BL, 0),
            positions=counted,
            soft_BL=soft_BL,
            soft_KSD=later_KSD,
        )

    def mask_behind(self, columns: int) -> Tensor:
        """1 where there is a token, that many columns before included."""
        if self.before_BP is None:
            return F.pad(self.mask_BL, (columns, 0), value=1)
        return torch.cat([self.before_BP, self.mask_BL], dim=1)

    def last_positions(self) -> Tensor:
        """The largest position of each prompt, (B,)."""
        rows = self.positions if self.positions.ndim == 2 else self.positions.amax(0)
        # Behind others they may be negative.
        return rows.masked_fill(self.mask_BL == 0, torch.iinfo(rows.dtype).min).amax(1)

    def behind(self, before_BP: Tensor, next_B: Tensor) -> Embedded:
        """The same prompts, to be read behind keys and values of P columns.

        Args:
            before_BP: 1 where the columns hold a token of what stands before each prompt.
            next_B: position of the first token behind that.
        """
        # Whoever reads counts positions from the columns, which is right where every one is a position.
        shift_B1 = (next_B - before_BP.shape[1])[:, None]
        return replace(self, before_BP=before_BP, positions=self.positions + shift_B1)


def embed(
    words: Callable[[Tensor], Tensor],
    packed: Packed,
    visual: Tensor | None,
    fused: Tensor | None,
    positions: Tensor,
) -> Embedded:
    """Put text, visual tokens and fused tokens at their places.

    Args:
        words: ids -> input embeddings.
        visual: of all pictures, (sum of V, D + K D).
        fused: of all demonstrations, (sum of T, D).
        positions: what `positions_of` gives.
    """
    embeds_BLD = words(packed.ids_BL)
    width, deep = embeds_BLD.shape[-1], tuple[Tensor, ...]()
    if visual is not None:
        first, *others = torch.split(visual.to(embeds_BLD.dtype), width, dim=-1)
        embeds_BLD = embeds_BLD.masked_scatter(packed.image_BL[..., None], first)
        deep = tuple(others)
    if fused is not None:
        embeds_BLD = embeds_BLD.masked_scatter(packed.fused_BL[..., None], fused.to(embeds_BLD.dtype))
    return Embedded(embeds_BLD, packed.mask_BL, packed.image_BL, packed.answer_BL, positions, deep=deep)


def positions_of(packed: Packed, rope_index: Callable[..., tuple[Tensor, Tensor]] | None) -> Tensor:
    """Positions of all tokens, padding aside.

    Args:
        rope_index: the `get_rope_index` of a model whose pictures have rows and columns. It reads which
            tokens are visual and the grids of the pictures; of the ids, only how many there are.
    """
    if rope_index is None or not packed.image_BL.any():
        return (packed.mask_BL.long().cumsum(1) - 1).clamp(min=0)
    positions, _ = rope_index(
        packed.ids_BL,
        mm_token_type_ids=packed.image_BL.int(),
        image_grid_thw=packed.grids_N3,
        attention_mask=packed.mask_BL,
    )
    return positions


def language_inputs(prompts: Embedded, attends: str, config: Any, cache: Any = None) -> dict[str, Any]:
    """Arguments of a language model's `forward`.

    Args:
        attends: as in `families.Family`.
        config: the language model's own.
        cache: keys and values of what stands before all prompts, if there is something.
    """
    before = cache.get_seq_length() if cache is not None else 0
    inputs: dict[str, Any] = {
        "inputs_embeds": prompts.embeds_BLD,
        "attention_mask": prompts.mask_behind(before),
        "position_ids": prompts.positions + before,
        "past_key_values": cache,
    }
    given = inputs | {"config": config}
    if prompts.deep:
        inputs |= {"visual_pos_masks": prompts.image_BL, "deepstack_visual_embeds": list(prompts.deep)}
    if attends == "pictures":
        image_BL = F.pad(prompts.image_BL.int(), (before, 0))
        blocks_BL = get_block_sequence_ids_for_mask(image_BL, device=image_BL.device)
        inputs["attention_mask"] = create_masks_for_vision_model(**given, block_sequence_ids=blocks_BL)
    elif attends == "prefix":
        answer_BL = F.pad(prompts.answer_BL.int(), (before, 0))
        inputs["attention_mask"] = _prefix_masks(given, answer_BL)
    return inputs


def _prefix_masks(given: Mapping[str, Any], answer_BL: Tensor) -> Any:
    """All before the first answer sees all of itself; from there on, each token what came before."""
    blocks_BL = torch.where(answer_BL.cumsum(1) > 0, -1, 0)
    whole = create_causal_mask(**given, block_sequence_ids=blocks_BL)
    if getattr(given["config"], "sliding_window", None) is None:
        return whole
    return {"full_attention": whole, "sliding_attention": create_sliding_window_causal_mask(**given)}

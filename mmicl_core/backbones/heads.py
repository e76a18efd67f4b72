"""What attention heads give at the end of a prompt: reading it, and putting something else in its place.

The end is the token from which the first token of the answer is told.

What the heads of a layer give stands side by side in the input of the layer's output projection, so that is
where it is read and replaced, by hooks that are there for one pass and gone after it. In an encoder-decoder
the prompt is looked at from the decoder, so its heads are those of the decoder's cross-attention.

Shapes (letters in `mmicl_core.shapes`): K layers of H heads, each E wide; H E need not be D.

Hooks sit on the model itself: while they wait, whoever else runs it gets them. Enter right before the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmicl_core.backbones.families import part
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.errors import BackboneError

__all__ = ["Heads"]


class Heads:
    """The heads through which a backbone's answers look at their prompts.

    Raises:
        BackboneError: a layer has no output projection where the family's row says, or one that its heads do
            not share evenly.
    """

    def __init__(self, backbone: HuggingFaceBackbone) -> None:
        self._decoder = backbone.family.decoder
        self._projections = [part(block, backbone.family.heads) for block in _blocks(backbone)]
        self._heads = int(backbone.text_config.num_attention_heads)
        widths: set[Any] = {projection.in_features for projection in self._projections}
        if len(widths) > 1 or min(widths) % self._heads:
            raise BackboneError(
                f"{backbone.family.heads} takes {sorted(widths)} channels, which differ between layers or "
                f"are no multiple of {self._heads} heads: name another in mmicl_core/backbones/families.py"
            )
        self._width = int(widths.pop()) // self._heads

    @property
    def shape(self) -> tuple[int, int, int]:
        """K, H, E."""
        return len(self._projections), self._heads, self._width

    def columns(self, prompts: Embedded) -> Tensor:
        """Where each prompt ends, (B,): at its last token, or before the answer where that is given."""
        if self._decoder is not None:
            return torch.zeros_like(prompts.mask_BL[:, 0])
        asked_BL = prompts.mask_BL.bool() & (prompts.answer_BL.int().cumsum(1) == 0)
        order_L = torch.arange(asked_BL.shape[1], device=asked_BL.device)
        return (asked_BL * order_L).argmax(1)

    @contextmanager
    def read(self, prompts: Embedded) -> Iterator[list[Tensor]]:
        """Keep what the heads give in the first pass inside, (B, H, E) of every layer in its order."""
        rows_B, columns_B = self._places(prompts)
        seen: list[Tensor] = []

        def keep(_: int, given_BLX: Tensor) -> None:
            seen.append(given_BLX[rows_B, columns_B].view(-1, *self.shape[1:]))

        with self._once(keep):
            yield seen

    @contextmanager
    def replace(self, prompts: Embedded, values_KHE: Tensor, chosen: Tensor) -> Iterator[None]:
        """Give other values in the first pass inside; what is decoded after it, from its cache, is as ever.

        Args:
            chosen: 1 for heads that are replaced, 0 for others, (K, H) or, for each prompt, (B, K, H).
        """
        rows_B, columns_B = self._places(prompts)
        chosen_BKH = chosen.bool().expand(len(rows_B), *self.shape[:2])

        def change(layer: int, given_BLX: Tensor) -> Tensor:
            own_BHE = given_BLX[rows_B, columns_B].view(-1, *self.shape[1:])
            other_HE = values_KHE[layer].to(own_BHE.dtype)
            changed_BHE = torch.where(chosen_BKH[:, layer, :, None], other_HE, own_BHE)
            return given_BLX.index_put((rows_B, columns_B), changed_BHE.flatten(1))

        with self._once(change):
            yield

    def _places(self, prompts: Embedded) -> tuple[Tensor, Tensor]:
        columns_B = self.columns(prompts)
        return torch.arange(len(columns_B), device=columns_B.device), columns_B

    @contextmanager
    def _once(self, act: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Run `act` on the input of each layer's projection, once: afterwards the layer is as before."""
        handles: list[RemovableHandle] = []

        def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor | None]:
            def run(_: nn.Module, given: tuple[Tensor, ...]) -> Tensor | None:
                handles[layer].remove()
                return act(layer, given[0])

            return run

        for layer, projection in enumerate(self._projections):
            handles.append(projection.register_forward_pre_hook(hook(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _blocks(backbone: HuggingFaceBackbone) -> Sequence[nn.Module]:
    family = backbone.family
    if family.decoder is None:
        return list(backbone.layers)
    return list(part(backbone.language_side, f"{family.decoder}.{family.layers}").children())

"""What the methods need from a multimodal language model, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

__all__ = ["Backbone"]


class Backbone(Protocol):
    """A vision tower, a projector and a decoder-only language model.

    Shapes (letters in `mmicl_core.shapes`): a picture is V vectors of width W behind the tower and V
    of width D behind the projector.
    """

    width: int
    """D."""
    visual_tokens: int
    """V."""
    tokenizer: Any
    """Hugging Face tokenizer."""
    identity: str
    """Names the weights: equal for equal weights, different for different ones."""

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Decoded pictures -> what the vision tower reads, (N, 3, height, width)."""
        ...

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Vision tower: pixels -> (N, V, W). Frozen, no gradient."""
        ...

    def project(self, vision_NVW: Tensor) -> Tensor:
        """Projector: (N, V, W) -> (N, V, D)."""
        ...

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Token ids -> input embeddings (B, L, D)."""
        ...

    def hidden(self, embeds_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Language model body -> last hidden states after the final norm, (B, L, D)."""
        ...

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Hidden states -> scores over the vocabulary."""
        ...

    def generate(self, embeds_BLD: Tensor, mask_BL: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuation of left-padded prompts; ids without the end token."""
        ...

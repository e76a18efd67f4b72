"""Settings of the frozen multimodal model and of what is trained around or inside it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmicl_core.config.base import Config

__all__ = ["AimConfig", "BackboneConfig", "LclConfig", "MethodConfig", "SupConConfig"]


class BackboneConfig(Config):
    """The multimodal language model."""

    path: str = "embedded:nano"
    """Folder of a Hugging Face image-text-to-text model; `embedded:NAME` is one inside the package,
    `new:nano` an untrained nano."""

    vision_tower: str | None = None
    """Folder with the vision tower of an earlier run, to start from instead of the model's own."""


class AimConfig(Config):
    """AIM: demonstrations fused into virtual tokens (arXiv:2406.07588)."""

    type: Literal["aim"] = "aim"

    layer_norm: bool = True
    """LayerNorm after the projection, as in the same author's SelfCP; the paper leaves it open."""

    start: str | None = None
    """Folder of an aggregator to start from; none starts from the identity."""


class LclConfig(Config):
    """Link-context learning: the language model itself learns to follow demonstrations."""

    type: Literal["lcl"] = "lcl"

    train_vision_tower: bool = False
    """Train the vision tower as well. Its output then changes with every step and is kept nowhere: a step
    costs the tower for every picture of every episode."""


class SupConConfig(Config):
    """Vision tower pretraining by supervised contrast (arXiv:2004.11362)."""

    type: Literal["supcon"] = "supcon"

    embedding_width: int = Field(default=128, ge=8)
    """Width of the space where pictures are compared."""

    temperature: float = Field(default=0.1, gt=0)
    """Divides the cosines before the softmax."""

    pairs_in_a_row: int = Field(default=16, ge=1)
    """Pairs of the same subcategory that stand in a batch together."""

    teacher: str | None = None
    """Folder of a Hugging Face image model whose pooled features the tower learns to predict as well."""

    teacher_width: int = Field(default=1280, ge=1)
    """Width of the teacher's features."""

    teacher_weight: float = Field(default=10.0, ge=0)
    """Weight of the distance from the teacher, beside the contrast."""

    teacher_pixels: int = Field(default=112, ge=32)
    """Side of the square that the teacher sees."""


MethodConfig = Annotated[AimConfig | LclConfig | SupConConfig, Field(discriminator="type")]

"""A stock Hugging Face image model as a teacher: pictures -> pooled, centred features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, MobileNetV2Config, MobileNetV2ForImageClassification

from mmicl_core.errors import BackboneError, CheckpointError

__all__ = ["ImageTeacher", "load_mobilenet", "save_mobilenet"]

MOBILENET: dict[str, Any] = {
    "tf_padding": False,
    "layer_norm_eps": 1e-5,
    "hidden_act": "relu6",
    "finegrained_output": True,
    "first_layer_is_expansion": True,
    "num_labels": 1000,
}
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_SPREAD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def load_mobilenet(checkpoint: Path) -> MobileNetV2ForImageClassification:
    """A torchvision MobileNetV2 checkpoint (`mobilenet_v2-*.pth`) as the Hugging Face model.

    Raises:
        CheckpointError: its tensors do not map, in order, to those of the Hugging Face model.
    """
    model = MobileNetV2ForImageClassification(MobileNetV2Config(**MOBILENET))
    source = torch.load(checkpoint, weights_only=True)
    target = model.state_dict()
    if [tensor.shape for tensor in source.values()] != [tensor.shape for tensor in target.values()]:
        raise CheckpointError(
            f"{checkpoint} is not MobileNetV2: its tensors have other shapes or another order"
        )
    model.load_state_dict(dict(zip(target, source.values(), strict=True)))
    model.eval()
    return model


def save_mobilenet(checkpoint: Path, folder: Path) -> None:
    """Write the tower of a torchvision MobileNetV2 checkpoint as a Hugging Face model folder. Raises as
    above."""
    load_mobilenet(checkpoint).mobilenet_v2.save_pretrained(folder)


class ImageTeacher:
    """Pictures -> (N, E), by a model folder that `AutoModel` loads.

    Args:
        folder: the model.
        side: pixels of the square that it sees; pictures are stretched to it.
    """

    def __init__(self, folder: Path, side: int) -> None:
        if not (folder / "config.json").is_file():
            raise BackboneError(f"teacher {folder} is not a model folder: it has no config.json")
        self._model = AutoModel.from_pretrained(folder).eval()
        self._side = side

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Pooled features, as 32-bit floats."""
        size = (self._side, self._side)
        pixels = [np.asarray(picture.resize(size, Image.Resampling.BICUBIC)) for picture in pictures]
        scaled = (np.stack(pixels).astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_SPREAD
        batch = torch.from_numpy(scaled.transpose(0, 3, 1, 2)).contiguous()
        features: np.ndarray = self._model(batch).pooler_output.flatten(1).numpy()
        return features

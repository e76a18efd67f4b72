"""What a method trained, on disk: the trained parameters alone, and what they fit.

    adapter_model.safetensors   every trained parameter, 32-bit, by its name in the method
    adapter_config.json         the method with its settings; the backbone's name, digest, model type and
                                width; names and shapes; whatever else the run wants remembered

Loading compares what was saved with what is there, from the outside in, and names the first difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.data.files import folder_digest
from mmicl_core.errors import CheckpointError

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "adapter_identity",
    "load_parameters",
    "read_about",
    "save_parameters",
]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


class Trained(Protocol):
    """What is saved: a `base.Method`."""

    backbone: HuggingFaceBackbone
    config: Any

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are kept, by name."""
        ...


def save_parameters(method: Trained, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the trained parameters of a method.

    Args:
        about: remembered beside: the backbone's name, the revision of the code, metrics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        name: tensor.detach().float().cpu().contiguous() for name, tensor in method.trainable().items()
    }
    save_file(trained, folder / WEIGHTS_FILE)
    shapes = {name: list(tensor.shape) for name, tensor in trained.items()}
    told = {**_fits(method), "settings": method.config.model_dump(mode="json"), "parameters": shapes, **about}
    (folder / CONFIG_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def read_about(folder: Path) -> dict[str, Any]:
    """What `save_parameters` wrote beside the weights.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no adapter: it has no {CONFIG_FILE}")
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return about


def load_parameters(method: Trained, folder: Path) -> None:
    """Put saved parameters into a method of the same settings around the same model.

    Raises:
        CheckpointError: there are none, they cannot be read, or they are of another method, family, size or
            model; says which, with both values.
    """
    about = read_about(folder)
    for what, ours in _fits(method).items():
        theirs = about.get(what)
        if theirs != ours:
            raise CheckpointError(
                f"the adapter in {folder} is for {what} {theirs!r}, here it is {ours!r}: train one for this "
                "with `mmicl train`"
            )
    try:
        saved = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    trained = method.trainable()
    for name in sorted(saved.keys() | trained.keys()):
        found = tuple(saved[name].shape) if name in saved else "absent"
        wanted = tuple(trained[name].shape) if name in trained else "absent"
        if found != wanted:
            raise CheckpointError(
                f"the adapter in {folder} does not fit: {name} is {found} there, {wanted} here"
            )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def adapter_identity(folder: Path) -> str:
    """Digest of an adapter's weights and of what they fit.

    Raises:
        CheckpointError: there is none.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder} holds no adapter: it has no {CONFIG_FILE}")
    # A card tells how good the adapter is, and is no part of it.
    return folder_digest(folder, (".json", ".safetensors"), without=("card.json",))


def _fits(method: Trained) -> dict[str, Any]:
    backbone = method.backbone
    return {
        "method": method.config.type,
        "model_type": backbone.model.config.model_type,
        "width": backbone.width,
        "backbone": backbone.identity,
    }

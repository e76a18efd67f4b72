"""What an M-Hub may begin as: the Q-Former of a BLIP-2 or an InstructBLIP model, by its folder.

    safetensors of the folder --name by name--> queries, Q-Former, projection of the hub

BLIP-2 (Li et al. 2023, arXiv:2301.12597) is published without the half of its Q-Former that reads text, which
then begins at random (the released code of MMICT takes `bert-base-uncased`). InstructBLIP (Dai et al. 2023,
arXiv:2305.06500) and BLIP-2 for retrieval have that half and a tokenizer for it. The sizes of the Q-Former
must be those of the hub; the width of the language model need not, and then the projection begins anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import MmictConfig
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.adapter import CONFIG_FILE
from mmicl_core.methods.hub import Hub

__all__ = ["SOURCES", "TOKENIZER_FOLDER", "copy_qformer", "hub_tokenizer"]

log = logging.getLogger("mmicl")

TOKENIZER_FOLDER = "qformer_tokenizer"
PROJECTION = "language_projection"
SHARED = (
    ("queries", "query_tokens"),
    ("projection", PROJECTION),
    ("norm", "vision_model.post_layernorm"),
)
SOURCES = {
    "instructblip": SHARED,
    "blip-2": (
        *SHARED,
        ("qformer.embeddings.layernorm", "qformer.layernorm"),
        ("qformer.embeddings", "embeddings"),
    ),
}
"""Model types, and how they name what the hub names otherwise, by prefix."""


def hub_tokenizer(backbone: HuggingFaceBackbone, start: Path | None) -> Any:
    """The tokenizer of the hub's text: the one that its weights were trained with, else the backbone's.

    Raises:
        CheckpointError: the folder to start from has one that cannot be loaded.
    """
    folder = _tokenizer_folder(start) if start is not None else None
    if folder is None:
        return backbone.processor.qformer_tokenizer if backbone.family.instructed else backbone.tokenizer
    try:
        return AutoTokenizer.from_pretrained(folder)
    # Of a torn file the tokenizer library tells by whatever went wrong in it.
    except Exception as error:
        raise CheckpointError(f"the Q-Former's tokenizer in {folder} cannot be loaded: {error}") from error


@torch.no_grad()
def copy_qformer(hub: Hub, config: MmictConfig, folder: Path) -> None:
    """Begin as the Q-Former of a BLIP-2 or InstructBLIP model; what that lacks keeps its initial values.

    Raises:
        CheckpointError: the folder holds no such model, or one of other sizes; names the first difference.
    """
    source = _configuration(folder)
    _compare(config, source, folder)
    ours = {_their_name(name, source.model_type): parameter for name, parameter in hub.named_parameters()}
    theirs = _read(folder, ours)
    if "query_tokens" not in theirs:
        raise CheckpointError(f"{folder} holds no Q-Former: no safetensors file of it has 'query_tokens'")
    copied = 0
    for name, parameter in ours.items():
        there, here = tuple(theirs[name].shape) if name in theirs else None, tuple(parameter.shape)
        if there == here:
            parameter.copy_(theirs[name])
            copied += 1
        elif there is not None and not name.startswith(PROJECTION):
            raise CheckpointError(
                f"the Q-Former in {folder} does not fit: {name} is {there} there, {here} here: start from a "
                "model with the same vision tower and tokenizer"
            )
    log.info(
        "the hub begins with %d of its %d tensors from %s; %d keep their initial values",
        *(copied, len(ours), folder, len(ours) - copied),
    )


def _compare(config: MmictConfig, source: Any, folder: Path) -> None:
    said = source.qformer_config
    theirs = {
        "width": said.hidden_size,
        "layers": said.num_hidden_layers,
        "heads": said.num_attention_heads,
        "hidden": said.intermediate_size,
        "queries": source.num_query_tokens,
    }
    ours = config.model_dump()
    for name, size in theirs.items():
        if ours[name] != size:
            raise CheckpointError(
                f"the Q-Former in {folder} has {name} {size}, method.{name} is {ours[name]}: set it to {size}"
            )


def _their_name(name: str, model_type: str) -> str:
    for ours, theirs in SOURCES[model_type]:
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def _read(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    wanted, found = set(names), dict[str, Tensor]()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in wanted & set(tensors.keys())}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found


def _tokenizer_folder(start: Path) -> Path | None:
    if (start / TOKENIZER_FOLDER).is_dir():
        return start / TOKENIZER_FOLDER
    if (start / CONFIG_FILE).is_file():
        return None
    source = _configuration(start)
    reads_text = source.model_type == "blip-2" and source.qformer_config.use_qformer_text_input
    return start if reads_text else None


def _configuration(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no adapter and no model: method.start names the folder of one")
    try:
        source = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the configuration in {folder} cannot be read: {error}") from error
    if source.model_type not in SOURCES:
        raise CheckpointError(
            f"{folder} holds a model of type {source.model_type!r}, a hub begins as the Q-Former of "
            f"{' or '.join(sorted(SOURCES))}: name the folder of one in method.start"
        )
    return source

"""Making what a corpus and its training need out of published packages."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from mmicl_core.data.open_emoji import THINGS, build_open_emoji
from mmicl_core.errors import ConfigError
from pipelines.arguments import output_folder

__all__ = ["EVERYTHING", "build_corpus", "save_teacher"]

log = logging.getLogger("mmicl")

EVERYTHING = (
    *THINGS,
    "Smileys & Emotion",
    "People & Body",
    "Symbols",
    "Flags",
    "Component",
)
RENDERER = "resvg_py"


def build_corpus(output: Path, packages: Path, *, everything: bool) -> dict[str, int]:
    """Write the open-emoji corpus; gives its counts.

    Raises:
        ConfigError: the renderer of SVG pictures is not installed.
        DataError: a package cannot be had.
    """
    if importlib.util.find_spec(RENDERER) is None:
        raise ConfigError(
            f"{RENDERER}, which renders SVG pictures, is not installed: pip install 'mmicl[corpus]'"
        )
    categories = EVERYTHING if everything else THINGS
    return build_open_emoji(output, packages, categories=categories, report=log.info)


def save_teacher(checkpoint: Path, output: str) -> None:
    """Write a MobileNetV2 checkpoint as the model folder that `method.teacher` names.

    Raises:
        ConfigError: there is no such file, or `output` cannot be a folder.
        CheckpointError: it is another model.
    """
    if not checkpoint.is_file():
        raise ConfigError(
            f"--checkpoint {checkpoint} does not exist: name the .pth file of a torchvision MobileNetV2"
        )
    # Torch takes seconds to import, and building a corpus needs none of it.
    from mmicl_core.data.embedding import save_mobilenet

    save_mobilenet(checkpoint, output_folder(output))

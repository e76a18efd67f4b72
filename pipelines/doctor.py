"""What this machine has and lacks: versions, processors, embedded assets, the parts of a backbone."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mmicl_core.assets import EMBEDDED, resolve
from mmicl_core.backbones.hugging_face import ROLES, outline_backbone
from mmicl_core.errors import MmiclError
from mmicl_core.methods import METHODS, build_method, default_settings

__all__ = ["STACK", "asset_problems", "examine", "read_pins", "version_lines"]

STACK = (
    "ray",
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pillow",
    "pydantic",
    "pydantic-settings",
    "fastapi",
)
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
ASSETS: Mapping[str, str] = {
    "open_emoji": "split.json",
    "nano": "config.json",
    "nano_aim": "adapter_config.json",
}


def examine(backbone: str | None) -> int:
    """Print everything; gives the number of problems, each of them named with its remedy on stderr.

    Raises:
        BackboneError: `backbone` is not a model, or its parts cannot be found.
    """
    print(f"python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs")
    print(f"{torch.cuda.device_count()} GPUs")
    lines, problems = version_lines(read_pins(CONSTRAINTS) if CONSTRAINTS.is_file() else {})
    print("\n".join(lines))
    problems += asset_problems(ASSETS)
    if backbone is not None:
        print("\n".join(_describe(resolve(backbone))))
    for problem in problems:
        print(f"mmicl: {problem}", file=sys.stderr)
    return len(problems)


def read_pins(constraints: Path) -> dict[str, str]:
    """Package -> version of a constraints file."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip().lower(): pinned.strip() for name, pinned in pins}


def version_lines(pins: Mapping[str, str], stack: Sequence[str] = STACK) -> tuple[list[str], list[str]]:
    """One line for each package of the stack, and what is missing. Other versions may work: no problem."""
    lines, problems = [], []
    for name in stack:
        try:
            # Builds of one version differ in what follows the plus sign.
            found = version(name)
            tested = pins.get(name)
            other = tested is not None and found.partition("+")[0] != tested
            lines.append(f"{name} {found}" + (f" (tested with {tested})" if other else ""))
        except PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install -c constraints.txt mmicl")
    return lines, problems


def asset_problems(assets: Mapping[str, str]) -> list[str]:
    """What the package should hold and does not."""
    problems = []
    for name, pattern in assets.items():
        try:
            complete = any(resolve(EMBEDDED + name).glob(pattern))
        except MmiclError as error:
            problems.append(f"{error}: install the package again, or check the repository out again")
            continue
        print(f"{EMBEDDED}{name} " + ("is there" if complete else f"lacks {pattern}"))
        if not complete:
            problems.append(f"{EMBEDDED}{name} lacks {pattern}: install the package again")
    return problems


def _describe(folder: Path) -> list[str]:
    """The roles of a model, and what each method would train of it; no weight is read."""
    backbone = outline_backbone(folder)
    family, total = backbone.family, sum(parameter.numel() for parameter in backbone.parameters())
    kind = "encoder-decoder" if family.decoder is not None else "decoder"
    lines = [
        f"backbone {backbone.identity}: {family.model_type}, {kind}, width {backbone.width}, vision width "
        f"{backbone.vision_width}, {total:,} parameters"
    ]
    for role in ROLES:
        counted = sum(parameter.numel() for _, parameter in backbone.role_parameters(role))
        tied = ", tied to the embeddings" if role == "head" and not counted else ""
        lines.append(f"  {role:<15} {' + '.join(family.roles[role])}: {counted:,} parameters{tied}")
    for name in METHODS:
        # Methods change what they are built around.
        method = build_method(outline_backbone(folder), default_settings(name))
        trained = sum(parameter.numel() for parameter in method.trainable().values())
        lines.append(f"  {name:<15} trains {trained:,} parameters, {trained / total:.2%}")
    return lines

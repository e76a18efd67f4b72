"""What this machine has and lacks: versions, processors, embedded assets, the parts of a backbone, and how
it stands to a cluster.

Each line is `ok`, or a `note` with what to do about it. What would stop a run goes to stderr with its remedy.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from cluster.checks import look_at_server
from cluster.client import JobServer
from mmicl_core.assets import EMBEDDED, resolve
from mmicl_core.backbones.hugging_face import ROLES, outline_backbone
from mmicl_core.errors import MmiclError
from mmicl_core.methods import METHODS, build_method, default_settings
from pipelines.environment import ray_token
from pipelines.machine import Sign, signs_of_machine

__all__ = ["STACK", "examine", "read_minima", "read_pins", "signs_of_assets", "signs_of_versions"]

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
INSTALL = "pip install -c constraints.txt mmicl"
PROJECT = "mmicl"
MINIMUM = re.compile(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)$")
ANSWER_SECONDS = 10.0
ASSETS: Mapping[str, str] = {
    "open_emoji": "split.json",
    "nano": "config.json",
    "nano_aim": "adapter_config.json",
}


def examine(backbone: str | None, output: str, bank: str | None = None, address: str | None = None) -> int:
    """Print everything; gives the number of problems, each of them named with its remedy on stderr.

    Args:
        backbone: a model to look into.
        output: folder of results.
        bank: folder of a server's bank.
        address: dashboard of a cluster to compare with.

    Raises:
        BackboneError: `backbone` is not a model, or its parts cannot be found.
    """
    problems = [sign for sign in _signs(output, bank, address) if not sign.tell()]
    if backbone is not None:
        print("\n".join(_describe(resolve(backbone))))
    for problem in problems:
        print(f"mmicl: {problem.says}: {problem.remedy}", file=sys.stderr)
    return len(problems)


def _signs(output: str, bank: str | None, address: str | None) -> Iterator[Sign]:
    cpus = os.cpu_count()
    yield Sign(f"python {platform.python_version()} on {platform.machine()}, {cpus} CPUs")
    yield from signs_of_versions(read_pins(CONSTRAINTS) if CONSTRAINTS.is_file() else {}, read_minima())
    yield from signs_of_machine(output, bank)
    yield from signs_of_assets(ASSETS)
    if address is not None:
        yield from _signs_of_cluster(address)


def read_pins(constraints: Path) -> dict[str, str]:
    """Package -> version of a constraints file."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip().lower(): pinned.strip() for name, pinned in pins}


def read_minima() -> dict[str, str]:
    """Package -> lowest version that the installed project asks for; nothing where it is not installed."""
    try:
        asked = requires(PROJECT) or []
    except PackageNotFoundError:
        return {}
    found = (MINIMUM.match(requirement) for requirement in asked)
    return {match[1].lower(): match[2] for match in found if match is not None}


def signs_of_versions(
    pins: Mapping[str, str], minima: Mapping[str, str], stack: Sequence[str] = STACK
) -> Iterator[Sign]:
    """Each package of the stack. Others than the tested versions may work, too old ones do not."""
    for name in stack:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Sign(f"{name} is not installed", INSTALL, stops=True)
            continue
        tested, least = pins.get(name), minima.get(name)
        if least is not None and _numbers(found) < _numbers(least):
            yield Sign(f"{name} {found} is older than {least}, which the project needs", INSTALL, stops=True)
        # Builds of one version differ in what follows the plus sign.
        elif tested is not None and found.partition("+")[0] != tested:
            yield Sign(f"{name} {found} (tested with {tested})", f"{INSTALL} gives the tested one")
        else:
            yield Sign(f"{name} {found}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])


def signs_of_assets(assets: Mapping[str, str]) -> Iterator[Sign]:
    """What the package should hold."""
    for name, pattern in assets.items():
        try:
            complete = any(resolve(EMBEDDED + name).glob(pattern))
        except MmiclError as error:
            yield Sign(str(error), "install the package again, or check the repository out again", stops=True)
            continue
        if complete:
            yield Sign(f"{EMBEDDED}{name} is there")
        else:
            yield Sign(f"{EMBEDDED}{name} lacks {pattern}", "install the package again", stops=True)


def _signs_of_cluster(address: str) -> Iterator[Sign]:
    _, findings = look_at_server(JobServer(address, *ray_token(), timeout=ANSWER_SECONDS))
    for finding in findings:
        wrong, _, remedy = ("", "", "") if finding.passed else finding.says.partition(": ")
        yield Sign(wrong or f"{finding.what}: {finding.says}", remedy or None, stops=not finding.passed)


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

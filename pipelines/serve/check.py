"""`mmicl serve --check`: all that a server needs, looked at without starting one.

Models are looked at without their weights: how an adapter fits is in its file, and what a model is made of in
its configuration.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from mmicl_core.backbones.decoding import context_length
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import ConfigError, MmiclError
from pipelines.environment import LEAST_CPUS, cluster, ray_outlives_the_program
from pipelines.serve.keys import list_keys
from pipelines.serve.media import Media
from pipelines.serve.premises import fit_adapter, located, outline, refuse_taken_port

__all__ = ["Finding", "check"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    passed: bool
    says: str
    """What was found, or what is wrong and what to do."""


def check(run: RunConfig) -> dict[str, Any]:
    """Look at everything; gives plain values, `passed` first."""
    findings = list(_look(located(run)))
    return {
        "passed": all(finding.passed for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _look(run: RunConfig) -> Iterator[Finding]:
    config = run.serve
    yield _tried("backbone", lambda: _backbone(run))
    for name, folder in config.adapters.items():
        yield _tried(f"adapter {config.model_id(name)}", partial(_adapter, folder, run))
    yield _tried("bank", lambda: _bank(config))
    yield _tried("keys", lambda: _keys(config))
    yield _tried("media", lambda: _media(config))
    yield _tried("port", lambda: _port(config))
    yield _tried("vllm", lambda: _vllm(config))
    yield _tried("resources", lambda: _resources(config))


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except MmiclError as error:
        return Finding(what, False, " ".join(str(error).split()))


def _backbone(run: RunConfig) -> str:
    found = outline(run)
    return f"{found.model.config.model_type}, {found.width} wide, reads {context_length(found)} tokens"


def _adapter(folder: str, run: RunConfig) -> str:
    try:
        backbone = outline(run)
    except MmiclError as error:
        raise ConfigError(f"the adapter in {folder} has no backbone to be compared with") from error
    return f"{fit_adapter(folder, backbone).config.type}, fits"


def _bank(config: ServeConfig) -> str:
    folder = Path(config.bank)
    # Looking leaves nothing behind, no empty folder either.
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        raise ConfigError(f"serve.bank {folder} cannot be written ({error}): name another folder") from error
    if free < config.bank_disk_bytes:
        raise ConfigError(
            f"serve.bank {folder} has {free:,} bytes free, serve.bank_disk_bytes wants "
            f"{config.bank_disk_bytes:,}: make room, or lower it"
        )
    return f"{folder}, {free:,} bytes free"


def _keys(config: ServeConfig) -> str:
    if config.keys is None:
        return "none: everybody on this machine is let in"
    names = [entry.name for entry in list_keys(Path(config.keys))]
    if not names:
        raise ConfigError(
            f"serve.keys {config.keys} holds no key, so that nobody is let in: "
            f"`mmicl serve keys add NAME --file {config.keys}` makes one"
        )
    return f"of {', '.join(names)}"


def _media(config: ServeConfig) -> str:
    Media(config).close()
    hosts = ", ".join(config.media_hosts)
    return f"pictures by URL from {hosts}" if hosts else "no pictures by URL"


def _port(config: ServeConfig) -> str:
    refuse_taken_port(config)
    return f"{config.host}:{config.port} is free"


def _vllm(config: ServeConfig) -> str:
    if config.vllm is None:
        return "not asked for"
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("serve.vllm is set, but vllm is not installed: `pip install vllm`, or leave it out")
    folder = Path(config.vllm.language_model)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"serve.vllm.language_model {folder} is no model folder: it has no config.json")
    return f"{folder}"


def _resources(config: ServeConfig) -> str:
    where, there = _resources_there()
    kinds = {"compressor": config.compressor, "generator": config.generator}
    needed = {
        "CPU": sum(kind.cpus * kind.fewest for kind in kinds.values()),
        "GPU": sum((kind.gpus or 0) * kind.fewest for kind in kinds.values()),
    }
    for name, least in needed.items():
        if least > there.get(name, 0):
            raise ConfigError(
                f"the fewest replicas of compressor and generator take {least:g} {name}, {where} has "
                f"{there.get(name, 0):g}: lower serve.*.fewest or serve.*.{name.lower()}s"
            )
    for name, kind in kinds.items():
        if kind.fewest == 0 and kind.cpus > there.get("CPU", 0) - needed["CPU"]:
            raise ConfigError(
                f"{where} has {there.get('CPU', 0):g} CPU, of which the fewest replicas leave too few for "
                f"the first {name}, which takes {kind.cpus:g}: lower serve.{name}.cpus"
            )
    most = sum(kind.cpus * kind.most for kind in kinds.values())
    reached = (
        "" if most <= there.get("CPU", 0) else f"; all replicas would take {most:g}, so some never start"
    )
    return f"{where} has {there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU{reached}"


def _resources_there() -> tuple[str, Mapping[str, float]]:
    if not ray_outlives_the_program():
        cpus = max(os.cpu_count() or 1, LEAST_CPUS)
        return "this machine", {"CPU": cpus, "GPU": torch.cuda.device_count()}
    try:
        with cluster():
            return "the cluster", ray.cluster_resources()
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"the cluster of RAY_ADDRESS cannot be reached: {error}") from error

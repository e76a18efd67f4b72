"""The hardware that a run is planned for, and what of the settings follows from it."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch

from mmicl_core.config.train import TrainConfig
from mmicl_core.errors import ConfigError

__all__ = ["Hardware", "casts", "compute_width", "micro_batch_of"]

UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for."""

    name: str
    workers: int
    """World size: one worker for each GPU, or as many as share a CPU."""
    device: Literal["gpu", "cpu"]
    device_bytes: int
    """Memory of one worker's device; on a CPU its share of the machine's."""
    host_bytes: int | None
    """One worker's share of its machine's memory, for what is offloaded; None where it is not known."""
    amx: bool = True
    """The CPU multiplies bf16 in hardware."""
    has_compiler: bool = True

    @classmethod
    def described(cls, gpus: int, memory: str, host: str | None = None) -> Self:
        """Hardware that is not here: `8, "80GB"`.

        Args:
            memory: of one GPU.
            host: what one worker has of its machine's memory.

        Raises:
            ConfigError: a size is none, or there is no GPU.
        """
        if gpus < 1:
            raise ConfigError(f"a plan for {gpus} GPUs has no worker: name at least 1")
        return cls(f"{gpus} x {memory}", gpus, "gpu", _bytes(memory), _bytes(host) if host else None)

    @classmethod
    def here(cls, workers: int) -> Self:
        """This machine: a GPU for each worker where there are enough, else an equal share of its memory."""
        amx = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
        memory, compiler = _machine_bytes(), any(map(shutil.which, ("c++", "g++", "clang++")))
        if torch.cuda.device_count() >= workers:
            about = torch.cuda.get_device_properties(0)
            share = memory // torch.cuda.device_count()
            return cls(f"{workers} x {about.name}", workers, "gpu", about.total_memory, share, amx, compiler)
        name = f"this machine, {workers} workers on its CPU"
        return cls(name, workers, "cpu", memory // workers, memory // workers, amx, compiler)


def compute_width(train: TrainConfig, hardware: Hardware) -> int:
    """w: bytes of a number in the type that the model computes in."""
    bf16 = hardware.device == "gpu" if train.precision == "auto" else train.precision == "bf16"
    return 2 if bf16 else 4


def casts(train: TrainConfig, hardware: Hardware) -> bool:
    """Whether matrices of a model in fp32 are multiplied in bf16."""
    return hardware.amx if train.autocast == "auto" else bool(train.autocast)


def micro_batch_of(train: TrainConfig, workers: int) -> int:
    """Episodes that one worker puts through the model at once."""
    return min(train.micro_batch, -(-train.global_batch // workers))


def _bytes(size: str) -> int:
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]+)", size.strip())
    if match is None or match[2].upper() not in UNITS or match[1].count(".") > 1:
        raise ConfigError(
            f"{size!r} is no memory size: write a number and one of GB, GiB, MB, TB, as in 80GB"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def _machine_bytes() -> int:
    """Memory that this machine, or the container around this process, has."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    told = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(physical, int(told)) if told.isdigit() else physical

"""Where figures are measured: the machine, and the versions of what runs on it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

__all__ = ["Conditions", "Machine"]

PACKAGES = ("torch", "ray", "transformers", "deepspeed", "mmicl")
CPUS, GPUS = Path("/proc/cpuinfo"), "nvidia-smi"


class Machine(BaseModel):
    """What the figures were measured on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        memory = round(psutil.virtual_memory().total / 2**30, 1)
        return cls(cpu=_cpu(), cores=os.cpu_count() or 1, memory_gib=memory, gpus=_gpus())

    def __str__(self) -> str:
        gpus = ", ".join(self.gpus) or "no GPU"
        return f"{self.cpu}, {self.cores} cores, {self.memory_gib:g} GiB, {gpus}"


class Conditions(BaseModel):
    """What figures depend on beside the code: those of other conditions are compared with care."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: Machine
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Conditions:
        """This machine, and what is installed."""
        installed = {name: version(name) for name in PACKAGES}
        return cls(machine=Machine.here(), versions={"python": platform.python_version()} | installed)

    @property
    def key(self) -> str:
        """Eight hex digits that name them."""
        told = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:8]

    def __str__(self) -> str:
        return f"{self.machine}; " + ", ".join(f"{name} {found}" for name, found in self.versions.items())


def _cpu() -> str:
    lines = CPUS.read_text(encoding="utf-8").splitlines() if CPUS.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _gpus() -> tuple[str, ...]:
    # By its tool: asking CUDA would hold memory of the GPU in the process that starts the workers.
    if shutil.which(GPUS) is None:
        return ()
    command = [GPUS, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return tuple(done.stdout.splitlines()) if done.returncode == 0 else ()

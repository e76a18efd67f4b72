"""What a machine gives a run: processors of pictures, memory that processes share, disk, ports, a token."""

from __future__ import annotations

import ipaddress
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mmicl_core.errors import ConfigError
from pipelines.environment import ray_token

__all__ = ["Sign", "signs_of_machine"]

GIGABYTE = 10**9
SHARED_MEMORY = Path("/dev/shm")
GPUS = "nvidia[0-9]*"
DRIVER = Path("/proc/driver/nvidia/version")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Ray's object store takes so much of the memory, and spills to no disk that is fuller than this.
STORE_SHARE, FULL_SHARE = 0.3, 0.95
LEAST_FREE_BYTES = GIGABYTE
# Ray opens a few files for each worker and for each of its connections.
OPEN_FILES = 65_536
PORTS = {8000: "serve.port", 8265: "Ray's dashboard", 6379: "the head of a Ray cluster"}
OTHERS = 0o077


@dataclass(frozen=True)
class Sign:
    """One thing that was looked at."""

    says: str
    remedy: str | None = None
    """What to do; None where nothing is wrong."""

    stops: bool = False
    """Whether a run cannot go on like this."""

    def tell(self) -> bool:
        """Print it, unless it stops runs; gives whether it was printed."""
        if self.stops:
            return False
        print(f"ok    {self.says}" if self.remedy is None else f"note  {self.says}: {self.remedy}")
        return True


def signs_of_machine(output: str, bank: str | None) -> Iterator[Sign]:
    """Look at everything.

    Args:
        output: folder of results.
        bank: folder of a server's bank.
    """
    yield from _gpus()
    yield _shared_memory(_memory_bytes())
    yield from _disk("--output", output)
    if bank is not None:
        yield from _disk("--bank", bank)
    yield _temporary(Path(tempfile.gettempdir()))
    yield _open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield from (_port(port, use) for port, use in PORTS.items())
    yield _name()
    yield _token()
    yield Sign("models are read from folders, none is downloaded")


def _gpus() -> Iterator[Sign]:
    seen, devices = torch.cuda.device_count(), len(list(Path("/dev").glob(GPUS)))
    yield Sign(f"{seen} GPUs")
    if devices > seen:
        yield Sign(
            f"this machine has {devices} GPUs, torch sees {seen}",
            "install the build of torch for the CUDA that `nvidia-smi` names, and unset CUDA_VISIBLE_DEVICES",
        )
    if DRIVER.is_file():
        yield Sign(DRIVER.read_text(encoding="utf-8").splitlines()[0])
    if not seen:
        return
    names = ", ".join(sorted({torch.cuda.get_device_name(number) for number in range(seen)}))
    yield Sign(f"{names}, CUDA {torch.version.cuda}")
    if torch.distributed.is_nccl_available():
        # torch gives it no type.
        found = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        yield Sign(f"NCCL {'.'.join(map(str, found))}")
    else:
        yield Sign("torch has no NCCL", "workers talk over gloo, slowly: install a build of torch with CUDA")


def _memory_bytes() -> int:
    """Of this machine, or what a container leaves of it."""
    all_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = MEMORY_LIMIT.read_text(encoding="utf-8").strip()
    except OSError:
        return all_bytes
    return min(all_bytes, int(limit)) if limit.isdecimal() else all_bytes


def _shared_memory(memory_bytes: int) -> Sign:
    if not SHARED_MEMORY.is_dir():
        return Sign(f"there is no {SHARED_MEMORY}", "Ray keeps its objects on disk, which is slow")
    found, wanted = shutil.disk_usage(SHARED_MEMORY).total, int(STORE_SHARE * memory_bytes)
    says = f"{SHARED_MEMORY} {_gigabytes(found)}, memory {_gigabytes(memory_bytes)}"
    if found >= wanted:
        return Sign(says)
    return Sign(
        says,
        f"Ray wants {_gigabytes(wanted)} there and goes to disk, slowly: docker run --shm-size, or in "
        "Kubernetes an emptyDir of medium Memory",
    )


def _disk(flag: str, name: str) -> Iterator[Sign]:
    folder = Path(name).absolute()
    # Looking leaves nothing behind, no empty folder either.
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        yield Sign(f"{flag} {name} cannot be written ({error})", "name another folder", stops=True)
        return
    if free < LEAST_FREE_BYTES:
        yield Sign(f"{flag} {name} has {free:,} bytes free", "make room, or name another folder", stops=True)
    else:
        yield Sign(f"{flag} {name} can be written, {_gigabytes(free)} free")


def _temporary(folder: Path) -> Sign:
    usage = shutil.disk_usage(folder)
    says = f"{folder}, where Ray keeps its sessions: {_gigabytes(usage.free)} free"
    if usage.free >= (1 - FULL_SHARE) * usage.total:
        return Sign(says)
    return Sign(says, f"Ray spills nothing to a disk that is {FULL_SHARE:.0%} full: make room, or set TMPDIR")


def _open_files(most: int) -> Sign:
    if most == resource.RLIM_INFINITY or most >= OPEN_FILES:
        return Sign(f"{'any number of' if most == resource.RLIM_INFINITY else most} open files")
    return Sign(f"{most} open files", f"large clusters need more: ulimit -n {OPEN_FILES}")


def _port(port: int, use: str) -> Sign:
    with socket.socket() as probe:
        # What a server left behind a moment ago does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return Sign(
                f"port {port} ({use}) is taken ({error.strerror})",
                "all is well if that is what listens there, which `ray status` says; else name another port",
            )
    return Sign(f"port {port} ({use}) is free")


def _name() -> Sign:
    """Workers without GPUs meet each other by gloo, which listens where the name of the machine leads."""
    name = socket.gethostname()
    try:
        addresses = {found[4][0] for found in socket.getaddrinfo(name, None)}
    except OSError as error:
        addresses = set()
        says = f"this machine's name, {name}, leads nowhere ({error.strerror})"
    else:
        says = f"this machine's name, {name}, leads to {', '.join(sorted(map(str, addresses)))}"
    if any(not ipaddress.ip_address(str(one).partition("%")[0]).is_loopback for one in addresses):
        return Sign(says)
    return Sign(
        says,
        "to train without GPUs on several machines, set GLOO_SOCKET_IFNAME to the device between them "
        "(`ip route` names it) where Ray is started",
    )


def _token() -> Sign:
    try:
        token, where = ray_token()
    except ConfigError as error:
        return Sign(str(error), "or unset it", stops=True)
    file = Path(where)
    if token is None:
        return Sign(f"no token for a cluster ({where}); Ray makes one when it first starts here")
    if file.is_file() and file.stat().st_mode & OTHERS:
        return Sign(f"the token in {where} can be read by others", f"chmod 600 {where}")
    return Sign(f"a token for a cluster, from {where}")


def _gigabytes(count: int) -> str:
    return f"{count / GIGABYTE:.1f} GB"

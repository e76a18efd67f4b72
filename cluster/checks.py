"""What is looked at before a job is sent: the package, the cluster, and where the run reads and writes."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePosixPath

from cluster.client import JobServer
from cluster.leaks import find_secrets
from cluster.package import Package
from mmicl_core.errors import ConfigError

__all__ = [
    "Cluster",
    "Finding",
    "Place",
    "limit_bytes",
    "look_at_package",
    "look_at_places",
    "look_at_server",
]

MEBIBYTE = 2**20
# RAY_max_grpc_message_size of the server, which holds packages in its memory: as of a version of Ray.
LARGE_SINCE, LARGE_BYTES, SMALL_BYTES = (2, 60), 512 * MEBIBYTE, 100 * MEBIBYTE
LARGEST = 3
INSIDE = ("embedded:", "new:")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    passed: bool
    says: str
    """What was found, or what is wrong and what to do."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster says of itself; None is what it does not say."""

    ray: str | None = None
    python: str | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class Place:
    """A path that a run reads or writes."""

    setting: str
    path: str
    written: bool


def limit_bytes(ray: str | None) -> int:
    """The largest package that a server of this version of Ray takes."""
    numbers = tuple(int(part) for part in (ray or version("ray")).split(".")[:2])
    return LARGE_BYTES if numbers >= LARGE_SINCE else SMALL_BYTES


def look_at_server(server: JobServer) -> tuple[Cluster, list[Finding]]:
    """Ask a cluster who it is, and compare that with what is here."""
    try:
        cluster = Cluster(server.ray_version(), server.python_version(), server.nodes())
    except ConfigError as error:
        return Cluster(), [Finding("server", False, str(error))]
    token = "with the token" if server.headers else "without a token"
    nodes = "nodes that it does not count" if cluster.nodes is None else f"{cluster.nodes} nodes"
    return cluster, [
        Finding("server", True, f"{server.address} answers {token}, {nodes}"),
        _ray(server.address, cluster.ray),
        _python(server.address, cluster.python),
    ]


def _ray(address: str, theirs: str | None) -> Finding:
    ours = version("ray")
    if theirs == ours:
        return Finding("ray", True, f"{ours} on both sides")
    return Finding(
        "ray",
        False,
        f"the cluster at {address} runs Ray {theirs}, and Ray {ours} is installed here: give both the "
        f"version that constraints.txt pins (here: pip install 'ray=={theirs}')",
    )


def _python(address: str, theirs: str | None) -> Finding:
    ours = platform.python_version()
    if theirs is None:
        return Finding("python", True, f"the cluster does not say what it runs; {ours} here")
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        return Finding("python", True, f"{theirs} there, {ours} here")
    return Finding(
        "python",
        False,
        f"the cluster at {address} runs Python {theirs}, and this is Python {ours}: submit from an "
        f"environment of Python {'.'.join(theirs.split('.')[:2])}, or give the cluster an image of ours",
    )


def look_at_package(package: Package, limit: int) -> list[Finding]:
    """Whether a package can be sent, and whether anybody may see it."""
    largest = ", ".join(f"{name} ({size:,} bytes)" for name, size in package.largest(LARGEST))
    size = f"{len(package.sizes):,} files, {package.total_bytes:,} bytes"
    if package.total_bytes >= limit:
        fitting = Finding(
            "package",
            False,
            f"the package of {package.root} has {size}, and the cluster takes fewer than {limit:,}; the "
            f"largest are {largest}: name in .rayignore what the job does not need, and put data where "
            "the cluster reads it itself",
        )
    else:
        fitting = Finding("package", True, f"{size} of at most {limit:,}; the largest are {largest}")
    return [fitting, *(Finding("secret", False, sentence) for sentence in find_secrets(package))]


def look_at_places(
    places: Sequence[Place], package: Package, nodes: int | None, shared: Sequence[str]
) -> list[Finding]:
    """Whether what a run reads and writes can be found from every node of the cluster."""
    return list(_look_at_places(places, package, nodes, shared))


def _look_at_places(
    places: Sequence[Place], package: Package, nodes: int | None, shared: Sequence[str]
) -> Iterator[Finding]:
    for place in places:
        wrong = _wrong(place, package, nodes, shared)
        # Whether it is there, and the same on all nodes, can only be seen from there.
        later = "; the job itself looks whether its nodes share it" if place.written else ""
        yield Finding("storage", wrong is None, wrong or f"{place.setting} {place.path}{later}")


def _wrong(place: Place, package: Package, nodes: int | None, shared: Sequence[str]) -> str | None:
    path = PurePosixPath(place.path)
    if "://" in place.path or place.path.startswith(INSIDE):
        return None
    if not path.is_absolute() and place.written:
        return (
            f"{place.setting} {path} is relative, which in a job is a folder that goes when the job ends: "
            "name an absolute one, which all nodes of the cluster share"
        )
    if not path.is_absolute():
        if package.holds(place.path):
            return None
        return (
            f"{place.setting} {path} is relative, and does not travel with the job: name an absolute path or "
            "a URI that the cluster reads"
        )
    if nodes is None or nodes < 2 or any(path.is_relative_to(folder) for folder in shared):
        return None
    return (
        f"{place.setting} {path} is a path of one machine, as far as can be seen from here, and the cluster "
        f"has {nodes} nodes: name a URI, or a folder that all of them mount, and say so with --shared "
        f"{PurePosixPath(*path.parts[:3])}"
    )

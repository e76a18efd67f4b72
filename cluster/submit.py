"""Submission: judge a `mmicl` command before anything is spent, then hand it to a cluster as a job.

The checkout travels as Ray's working directory, and the image of the cluster brings the libraries. The job
reserves neither CPU nor GPU for its entry point, which starts the tasks that do. What a job makes is named
by what made it, so the same command submitted again goes on where the last one ended.
"""

from __future__ import annotations

import re
import secrets
import shlex
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.checks import (
    Cluster,
    Finding,
    Place,
    limit_bytes,
    look_at_package,
    look_at_places,
    look_at_server,
)
from cluster.client import SET_TOKEN, JobServer, ray_client
from cluster.package import EXCLUDES, Package, gather
from mmicl_core.errors import ConfigError

__all__ = ["Submission", "describe", "job_name", "prepare", "refuse", "send"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
LARGEST = 5
# Where a node unpacks the package, known to Ray when it installs.
UNPACKED = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"


@dataclass(frozen=True)
class Submission:
    """A job that has not been sent."""

    name: str
    address: str
    entrypoint: str
    pip: list[str]
    """What the cluster installs for it; nothing if its image has all."""

    package: Package
    cluster: Cluster
    findings: list[Finding]


def job_name(verb: str) -> str:
    """A name that says what and when, and is nobody else's."""
    day = datetime.now(UTC).strftime("%Y%m%d")
    return f"mmicl-{verb}-{day}-{secrets.token_hex(2)}"


def prepare(
    root: Path,
    command: Sequence[str],
    server: JobServer,
    *,
    name: str | None = None,
    places: Sequence[Place] = (),
    shared: Sequence[str] = (),
    pip: bool = False,
) -> Submission:
    """Look at everything that a job needs, and send nothing.

    Args:
        root: the checkout.
        command: what follows `mmicl`.
        server: that shall run it.
        name: of the job; one is made up if None.
        places: that the command reads and writes.
        shared: folders that all nodes of the cluster mount.
        pip: whether the cluster installs the pinned packages, instead of having them.

    Raises:
        ConfigError: `name` is none that a job can have.
    """
    if name is not None and NAME.fullmatch(name) is None:
        raise ConfigError(
            f"--name {name} is no name of a job: up to 100 letters, digits, '.', '_' and '-', no sign first"
        )
    package = gather(root)
    cluster, findings = look_at_server(server)
    findings += look_at_package(package, limit_bytes(cluster.ray))
    findings += look_at_places(places, package, cluster.nodes, shared)
    return Submission(
        name or job_name(command[0]),
        server.address,
        shlex.join(["python", "-m", "pipelines.cli", *command]),
        _requirements(root) if pip else [],
        package,
        cluster,
        findings,
    )


def describe(job: Submission) -> dict[str, Any]:
    """All of a job as plain values, `passed` first."""
    package = job.package
    return {
        "passed": all(finding.passed for finding in job.findings),
        "findings": [asdict(finding) for finding in job.findings],
        "job": job.name,
        "address": job.address,
        "entrypoint": job.entrypoint,
        "runtime_env": _runtime_env(job, package.root),
        "cluster": asdict(job.cluster),
        "package": {
            "files": len(package.sizes),
            "bytes": package.total_bytes,
            "limit_bytes": limit_bytes(job.cluster.ray),
            "largest": [{"file": name, "bytes": size} for name, size in package.largest(LARGEST)],
            "excludes": list(EXCLUDES),
            "links_left_behind": list(package.links),
        },
    }


def refuse(job: Submission) -> None:
    """Stop here if anything was found to be wrong.

    Raises:
        ConfigError: one sentence for each.
    """
    wrong = [finding.says for finding in job.findings if not finding.passed]
    if wrong:
        raise ConfigError("\n".join(wrong))


def send(job: Submission, server: JobServer) -> None:
    """Upload the package, if the cluster lacks it, and start the job.

    Raises:
        ConfigError: the cluster does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="mmicl-") as folder:
        archive = Path(folder) / "checkout.zip"
        job.package.write(archive)
        from ray.exceptions import AuthenticationError

        try:
            ray_client(server).submit_job(
                entrypoint=job.entrypoint, submission_id=job.name, runtime_env=_runtime_env(job, archive)
            )
        except AuthenticationError as error:
            raise ConfigError(f"--address {job.address} did not take the job: {SET_TOKEN}") from error
        except (OSError, RuntimeError, ValueError) as error:
            # What the server answers is a traceback, whose last line says what is wrong.
            reason = str(error).strip().splitlines()[-1]
            raise ConfigError(f"--address {job.address} did not take the job: {reason}") from error


def _runtime_env(job: Submission, folder: Path) -> dict[str, Any]:
    installed = {"pip": {"packages": job.pip}} if job.pip else {}
    return {"working_dir": str(folder)} | installed


def _requirements(root: Path) -> list[str]:
    """What the project needs, as pinned; Ray comes with the cluster and cannot be another there."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [name for name in project["dependencies"] if re.match(r"ray\b", name) is None]
    return [f"-c {UNPACKED}/constraints.txt", *needed]

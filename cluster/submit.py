"""Job submission: package the checkout, submit a command, follow it, end with its status.

The checkout travels as Ray's working directory, so the cluster runs what lies here, committed or not.
The head node's image brings the libraries. Files that git ignores stay behind, and so does whatever
may hold a secret.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmicl_core.errors import ConfigError

__all__ = ["EXCLUDES", "checkout", "describe", "inside", "submit"]

EXCLUDES = (
    ".git",
    ".venv",
    ".*cache",
    "runs",
    "build",
    "dist",
    "tests",
    "__pycache__",
    ".env*",
    "*.pem",
    "*.key",
    "*.log",
)
FAILED = 1


def checkout() -> Path:
    """The folder that is packaged.

    Raises:
        ConfigError: these packages were installed, and there is no checkout.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise ConfigError(f"{root} is not a checkout: submit from a clone of the repository")
    return root


def inside(root: Path, file: Path) -> str:
    """The path of a file from `root`, as the job will find it.

    Raises:
        ConfigError: it lies elsewhere.
    """
    path = file.resolve()
    if not path.is_relative_to(root):
        raise ConfigError(
            f"{file} lies outside the checkout {root}, which is all that a job sees: copy it there"
        )
    return str(path.relative_to(root))


def describe(root: Path, command: Sequence[str], address: str) -> dict[str, Any]:
    """What `submit` would send."""
    return {
        "address": address,
        "entrypoint": shlex.join(["python", "-m", "pipelines.cli", *command]),
        "runtime_env": {"working_dir": str(root), "excludes": list(EXCLUDES)},
    }


def submit(root: Path, command: Sequence[str], address: str) -> int:
    """Run a `mmicl` command as a job, print its log, and give its exit code. Ctrl-C stops the job.

    Raises:
        ConfigError: the cluster cannot be reached or refuses the job.
    """
    # Ray takes a second to import, and a dry run needs none of it.
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    job = describe(root, command, address)
    try:
        client = JobSubmissionClient(address)
        job_id = client.submit_job(entrypoint=job["entrypoint"], runtime_env=job["runtime_env"])
    except AuthenticationError as error:
        raise ConfigError(
            f"--address {address} did not take the job: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "~/.ray/auth_token to the token of the cluster"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--address {address} did not take the job: {reason}") from error
    print(f"mmicl: submitted {job_id}", file=sys.stderr)
    try:
        asyncio.run(_print_log(client, job_id))
    except KeyboardInterrupt:
        client.stop_job(job_id)
        raise
    status = client.get_job_status(job_id)
    print(f"mmicl: {job_id} {status.lower()}", file=sys.stderr)
    return 0 if status == JobStatus.SUCCEEDED else FAILED


async def _print_log(client: Any, job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        print(text, end="", flush=True)

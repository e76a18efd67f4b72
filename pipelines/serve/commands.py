"""What `mmicl serve` does: run until it is told to end, write a file to deploy, and keep keys."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

from mmicl_core.config.run import RunConfig
from mmicl_core.errors import ConfigError, MmiclError
from pipelines.serve import app, keys
from pipelines.serve.deploy_file import write_deploy_file

__all__ = ["build", "keep_keys", "serve"]

log = logging.getLogger("mmicl")


def serve(run: RunConfig) -> None:
    """Serve until Ctrl-C or SIGTERM; SIGHUP loads the adapters anew. Running answers are finished.

    Raises:
        ConfigError: it cannot start.
    """
    told = SimpleQueue[int]()
    with _signals(told):
        try:
            url = app.start(run)
            print(f"mmicl: serving at {url}; Ctrl-C stops", file=sys.stderr, flush=True)
            while told.get():
                _reload(run)
        finally:
            app.stop()


def build(run: RunConfig, out: str) -> dict[str, Any]:
    """Write a file for `serve deploy`.

    Raises:
        ConfigError: it cannot be written, or the run cannot be served.
    """
    try:
        write_deploy_file(run, Path(out))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}): name another file") from error
    return {"file": out}


def keep_keys(action: str, file: str, name: str | None) -> dict[str, Any]:
    """Add, list or remove API keys.

    Raises:
        ConfigError: the file or the name is wrong.
    """
    path = Path(file)
    if action == "list" or name is None:
        return {"keys": [{"name": entry.name, "created": entry.created} for entry in keys.list_keys(path)]}
    if action == "remove":
        keys.remove_key(path, name)
        return {"removed": name}
    return {"name": name, "key": keys.add_key(path, name)}


def _reload(run: RunConfig) -> None:
    try:
        app.reload(run)
    except MmiclError as error:
        log.error("mmicl: the adapters are served as they were: %s", error)
    else:
        log.info("mmicl: the adapters are served as they are now")


@contextmanager
def _signals(told: SimpleQueue[int]) -> Iterator[None]:
    """SIGTERM is another Ctrl-C; SIGHUP is put into `told`."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def tell(number: int, frame: FrameType | None) -> None:
        # Unlike those of other queues and events, this `put` may interrupt the `get` that it wakes.
        told.put(number)

    handlers = {signal.SIGTERM: end, signal.SIGHUP: tell}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

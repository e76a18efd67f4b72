"""What all tests share: the environment that the command line sets, and a Ray of their own."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipelines.environment import DEFAULTS, cluster

HERE = Path(__file__).parent
START_RAY = {"benchmarks", "integration", "trials"}

# Before any library that reads them is imported. Tests never touch a cluster that somebody works on.
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(DEFAULTS)
# Ray Train notices the end of its workers at the next look, by default every two seconds.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
# A shell has what it starts in the background ignore Ctrl-C, which tests send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Let other people's warnings pass; a warning of ours is an error."""
    # Ray Serve 2.60 declares its own settings in a way that Pydantic has deprecated.
    config.addinivalue_line(
        "filterwarnings", "ignore:Using extra keyword arguments on `Field`:DeprecationWarning"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray warns of its own use of its own deprecated settings; nothing here can mend that."""
    for item in items:
        if START_RAY & set(item.path.relative_to(HERE).parts):
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"))


@pytest.fixture(scope="session")
def _local_ray() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def ray_cluster(_local_ray: ExitStack) -> None:
    """A local Ray, the same for all modules that need one and start none themselves."""
    # Where one runs already, it is used.
    _local_ray.enter_context(cluster())


@pytest.fixture(scope="module")
def no_ray_cluster(_local_ray: ExitStack) -> None:
    """No Ray of these tests runs: a second one on a machine has no agent that takes jobs."""
    _local_ray.close()


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    # The command line takes the log lines of `mmicl` over; tests that read them do not want that.
    log = logging.getLogger("mmicl")
    before = (log.level, log.propagate, list(log.handlers))
    yield
    log.level, log.propagate, log.handlers = before

"""Where the training log also goes: TensorBoard, Weights & Biases, MLflow.

A tracker works in a thread of its own, which opens it at the first line and writes line by line: a server
that is slow or gone holds no step up. What cannot be written is dropped and counted, with a warning when that
begins; the log that nothing is missing from is the file of the run itself. A run that is resumed under its
name goes on with its curves.

    tensorboard     FOLDER/tensorboard/NAME
    wandb           the server of `wandb login`, or with WANDB_MODE=offline FOLDER/wandb; project `mmicl`, or
                    WANDB_PROJECT
    mlflow          MLFLOW_TRACKING_URI, or FOLDER/mlflow.db; experiment `mmicl`, or MLFLOW_EXPERIMENT_NAME

The libraries read these variables themselves, in the process of the worker that logs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmicl_core.errors import ConfigError

__all__ = ["Tracker", "check_trackers", "open_trackers"]

log = logging.getLogger("mmicl")

PROJECT = "mmicl"
RUN_TAG = "mmicl.run"
# What each tracker imports, first the package that it is named after.
PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}
MOST_WAITING = 1000
FLUSH_SECONDS = 10
# A run that has ended waits no longer for what is under way.
CLOSE_SECONDS = 60.0
# The most that an MLflow server takes at once, and the longest setting.
MLFLOW_SETTINGS, MLFLOW_SETTING_LENGTH = 100, 6000


class Tracker(Protocol):
    """One place that the log goes to."""

    name: str
    dropped: int
    """Lines that did not get there."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand a line over; mappings inside become names with `/`, and what is no number is left out."""
        ...

    def close(self) -> None:
        """Wait, for a limited time, until everything is written."""
        ...


def check_trackers(names: Iterable[str]) -> None:
    """See that every tracker can be imported.

    Raises:
        ConfigError: a package is not installed.
    """
    for name in names:
        missing = [package for package in PACKAGES[name] if not _is_installed(package)]
        if missing:
            raise ConfigError(
                f"train.trackers names {name!r}, but the package {missing[0]} is not installed: "
                f"pip install 'mmicl[{name}]'"
            )


def open_trackers(
    names: Sequence[str], run_settings: Mapping[str, Any], folder: Path, run_name: str
) -> list[Tracker]:
    """Start a tracker for each name; on one worker only.

    Args:
        run_settings: plain values, shown beside the curves.
        folder: for what lies in files; runs may share it, and it has to outlive them.
        run_name: the name of the run's own folder; a run under the same name is the same run resumed.

    Raises:
        ConfigError: a package is not installed.
    """
    check_trackers(names)
    run = _Run(run_settings, folder.absolute(), run_name)
    return [_Background(name, run) for name in names]


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    # A folder of this name in the working directory, as wandb makes one, passes for a package without files.
    return found is not None and found.origin is not None


@dataclass(frozen=True)
class _Run:
    settings: Mapping[str, Any]
    folder: Path
    name: str


class _Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Background:
    """A tracker that never holds the caller up and never fails."""

    def __init__(self, name: str, run: _Run) -> None:
        self.name, self.dropped = name, 0
        self._run = run
        self._counting = threading.Lock()
        self._lines: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        try:
            self._lines.put_nowait((step, dict(_flatten(values))))
        except queue.Full:
            self._drop(1, f"{MOST_WAITING} lines wait already")

    def close(self) -> None:
        deadline, told = time.monotonic() + CLOSE_SECONDS, 0
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_SECONDS)
            told = 1
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            waiting = self._lines.unfinished_tasks - told
            self._drop(waiting, f"it has not ended after {CLOSE_SECONDS:.0f} seconds")
        if self.dropped:
            log.warning("Tracker %s is without %d lines of the training log", self.name, self.dropped)

    def _work(self) -> None:
        writer: _Writer | None = None
        while (line := self._lines.get()) is not None:
            try:
                writer = writer or WRITERS[self.name](self._run, line[0])
                writer.write(*line)
            # Whatever goes wrong in three foreign libraries and their networks, training goes on.
            except Exception as failure:
                self._drop(1, f"{type(failure).__name__}: {failure}")
            self._lines.task_done()
        try:
            if writer is not None:
                writer.close()
        except Exception as failure:
            self._drop(0, f"{type(failure).__name__}: {failure}")

    def _drop(self, lines: int, why: str) -> None:
        with self._counting:
            first, self.dropped = not self.dropped, self.dropped + lines
        if first:
            log.warning(
                "Tracker %s fails (%s); training goes on, and what it misses is counted", self.name, why
            )


class _TensorBoard:
    def __init__(self, run: _Run, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an earlier try logged from this step on.
        self._writer = SummaryWriter(
            run.folder / "tensorboard" / run.name, purge_step=first, flush_secs=FLUSH_SECONDS
        )
        told = json.dumps(run.settings, indent=1, default=str)
        # Markdown shows indented lines as they are.
        self._writer.add_text("settings", re.sub("^", "    ", told, flags=re.M), first)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run: _Run, first: int) -> None:
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=wandb.setup().settings.project or PROJECT,
            id=re.sub(r"[^\w.-]", "-", run.name),
            name=run.name,
            dir=str(run.folder),
            config=dict(run.settings),
            # A run may go on with other settings of the cluster.
            allow_val_change=True,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # Steps are taken again after a failure; the server keeps what it has of them.
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        # Without a server, `finish` does not wait for the process that writes the files; Ray kills workers.
        wandb.teardown()


class _Mlflow:
    def __init__(self, run: _Run, first: int) -> None:
        import mlflow
        from mlflow.entities import Param

        run.folder.mkdir(parents=True, exist_ok=True)
        self._client = mlflow.MlflowClient(None if mlflow.is_tracking_uri_set() else _database(run.folder))
        experiment = self._experiment(mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or PROJECT)
        # Inside quotes, a quote would end them.
        name = run.name.replace("'", "-")
        found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{name}'")
        if found:
            self._id = found[0].info.run_id
            self._last = self._last_step(found[0])
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(experiment, run_name=run.name, tags={RUN_TAG: name})
        self._id, self._last = made.info.run_id, -1
        params = [
            Param(_mlflow_name(key), str(value)[:MLFLOW_SETTING_LENGTH])
            for key, value in _leaves(run.settings)
        ]
        for start in range(0, len(params), MLFLOW_SETTINGS):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_SETTINGS])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        # A step that is taken again would stand in the curve twice.
        if step > self._last:
            now = int(time.time() * 1000)
            metrics = [Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
            self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _last_step(self, run: Any) -> int:
        histories = (self._client.get_metric_history(self._id, name) for name in run.data.metrics)
        return max((point.step for history in histories for point in history), default=-1)


WRITERS: Mapping[str, type[_TensorBoard | _WeightsAndBiases | _Mlflow]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _Mlflow,
}


def _database(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in _leaves(values):
        if isinstance(value, int | float):
            yield name, float(value)


def _leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value

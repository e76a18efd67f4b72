"""Where the training log also goes, read back with the libraries themselves."""

from __future__ import annotations

import logging
import struct
import threading
from pathlib import Path

import pytest

from mmicl_core.errors import ConfigError
from pipelines import trackers
from pipelines.trackers import check_trackers, open_trackers

NAME = "train-aim-0123456789ab"
SETTINGS = {"train": {"steps": 30, "zero": {"stage": 3}}, "data": "a folder"}

pytestmark = [
    # MLflow 3.17 loads relations in a way that SQLAlchemy 2.1 has deprecated.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def train(name: str, folder: Path, steps, settings=SETTINGS, scale: float = 1.0) -> trackers.Tracker:
    """Log each of `steps`, and end."""
    (tracker,) = open_trackers([name], settings, folder, NAME)
    for step in steps:
        tracker.log(step, {"loss": scale / step, "counted": {"cut": {"text": step}}, "validation_loss": None})
    tracker.close()
    return tracker


def tensorboard_curve(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / NAME))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def wandb_records(folder: Path) -> list[list]:
    """What each try left behind, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [[Record.FromString(data) for data in leveldb_log(path.read_bytes())] for path in paths]


def leveldb_log(data: bytes) -> list[bytes]:
    """The records of a run file: a log of LevelDB behind a header of 7 bytes.

    github.com/google/leveldb/blob/main/doc/log_format.md: blocks of 32 KiB, a record has a piece in some;
    a piece is checksum (4), length (2), kind (1; 1 is whole, 2 first, 4 last), content.
    """
    place, records, pieces = 7, [], b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        content = data[place + 7 : place + 7 + length]
        pieces = content if kind in (1, 2) else pieces + content
        if kind in (1, 4):
            records.append(pieces)
        place += 7 + length
    return records


def wandb_curve(records: list, name: str) -> list[tuple[int, float]]:
    points = []
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if name in items:
                points.append((int(items["_step"]), float(items[name])))
    return points


def mlflow_runs(folder: Path) -> tuple:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mmicl")
    return client, client.search_runs([experiment.experiment_id])


def mlflow_curve(folder: Path, name: str) -> list[tuple[int, float]]:
    client, (run,) = mlflow_runs(folder)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def test_tensorboard_shows_every_number_under_its_flattened_name(tmp_path):
    tracker = train("tensorboard", tmp_path, [1, 11])
    assert tensorboard_curve(tmp_path, "loss") == [(1, 1.0), (11, pytest.approx(1 / 11))]
    assert tensorboard_curve(tmp_path, "counted/cut/text") == [(1, 1.0), (11, 11.0)]
    with pytest.raises(KeyError):
        tensorboard_curve(tmp_path, "validation_loss")
    assert tracker.dropped == 0


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(tmp_path):
    train("tensorboard", tmp_path, [1, 11, 21])
    train("tensorboard", tmp_path, [11, 31], scale=2.0)
    assert tensorboard_curve(tmp_path, "counted/cut/text") == [(1, 1.0), (11, 11.0), (31, 31.0)]
    assert tensorboard_curve(tmp_path, "loss")[1] == (11, pytest.approx(2 / 11))


def test_wandb_writes_settings_and_numbers_for_a_later_upload(tmp_path):
    tracker = train("wandb", tmp_path, [1, 11])
    (records,) = wandb_records(tmp_path)
    assert wandb_curve(records, "loss") == [(1, 1.0), (11, pytest.approx(1 / 11))]
    assert wandb_curve(records, "counted/cut/text") == [(1, 1.0), (11, 11.0)]
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.project, run.run_id, run.display_name) == ("mmicl", NAME, NAME)
    told = {item.key: item.value_json for item in run.config.update}
    assert told["train"] == '{"steps":30,"zero":{"stage":3}}'
    assert tracker.dropped == 0


def test_wandb_knows_a_resumed_run_by_its_id(tmp_path):
    train("wandb", tmp_path, [1, 11])
    train("wandb", tmp_path, [11, 21], SETTINGS | {"data": "another folder"})
    tries = wandb_records(tmp_path)
    runs = [record.run.run_id for records in tries for record in records if record.HasField("run")]
    assert runs == [NAME, NAME]
    assert [step for step, _ in wandb_curve(tries[1], "loss")] == [11, 21]


def test_mlflow_keeps_settings_and_numbers_in_its_database(tmp_path):
    tracker = train("mlflow", tmp_path, [1, 11])
    assert mlflow_curve(tmp_path, "loss") == [(1, 1.0), (11, pytest.approx(1 / 11))]
    assert mlflow_curve(tmp_path, "counted/cut/text") == [(1, 1.0), (11, 11.0)]
    _, (run,) = mlflow_runs(tmp_path)
    assert run.info.run_name == NAME
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train/steps": "30", "train/zero/stage": "3", "data": "a folder"}
    assert "validation_loss" not in run.data.metrics
    assert tracker.dropped == 0


def test_mlflow_goes_on_with_a_resumed_run_and_has_no_step_twice(tmp_path):
    train("mlflow", tmp_path, [1, 11, 21])
    tracker = train("mlflow", tmp_path, [11, 21, 31], SETTINGS | {"data": "another folder"})
    assert [step for step, _ in mlflow_curve(tmp_path, "loss")] == [1, 11, 21, 31]
    assert tracker.dropped == 0


def test_mlflow_takes_settings_and_names_that_it_has_no_letters_for(tmp_path):
    settings = {f"setting {number}": "x" * 10_000 for number in range(150)} | {"caption's": {"a=b": None}}
    (tracker,) = open_trackers(["mlflow"], settings, tmp_path, "it's 'quoted'")
    tracker.log(1, {"replaced": {"no picture, no name": 2}})
    tracker.close()
    assert tracker.dropped == 0
    assert mlflow_curve(tmp_path, "replaced/no picture_ no name") == [(1, 2.0)]
    _, (run,) = mlflow_runs(tmp_path)
    assert len(run.data.params) == 151


def test_not_a_number_stays_one_in_every_tracker(tmp_path):
    for name, curve in [("tensorboard", tensorboard_curve), ("mlflow", mlflow_curve)]:
        train(name, tmp_path, [1], scale=float("nan"))
        ((step, value),) = curve(tmp_path, "loss")
        assert step == 1
        assert value != value


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_package_is_told_with_its_remedy(name, monkeypatch, tmp_path):
    monkeypatch.setitem(trackers.PACKAGES, name, ("a_package_that_nobody_has",))
    with pytest.raises(ConfigError) as told:
        check_trackers([name])
    assert f"'{name}'" in str(told.value)
    assert "a_package_that_nobody_has is not installed: pip install 'mmicl[" + name + "]'" in str(told.value)
    with pytest.raises(ConfigError):
        open_trackers([name], {}, tmp_path, NAME)


def test_folder_of_the_name_of_a_package_is_not_taken_for_it(monkeypatch, tmp_path):
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("only_a_folder",))
    with pytest.raises(ConfigError, match="only_a_folder"):
        check_trackers(["wandb"])


def test_installed_packages_pass_and_no_tracker_is_none(tmp_path):
    check_trackers(["tensorboard", "wandb", "mlflow"])
    assert open_trackers([], SETTINGS, tmp_path, NAME) == []
    assert not list(tmp_path.iterdir())


class Writer:
    """A tracker's own part that fails, or waits, as it is told."""

    def __init__(self, fails=(), opens_at: int = 0, gate: threading.Event | None = None) -> None:
        self.fails, self.opens_at, self.gate = fails, opens_at, gate
        self.written: list[int] = []
        self.closed = False

    def __call__(self, run, first: int) -> Writer:
        if first < self.opens_at:
            raise ConnectionError("no server")
        return self

    def write(self, step: int, values) -> None:
        if self.gate is not None:
            self.gate.wait()
        if step in self.fails:
            raise OSError("network gone")
        self.written.append(step)

    def close(self) -> None:
        self.closed = True
        if "close" in self.fails:
            raise OSError("network gone")


def log_steps(monkeypatch, tmp_path, writer: Writer, steps) -> trackers.Tracker:
    monkeypatch.setattr(trackers, "WRITERS", {"wandb": writer})
    return train("wandb", tmp_path, steps)


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_line_that_fails_is_counted_and_the_next_is_written(monkeypatch, tmp_path, caplog):
    writer = Writer(fails=(2, 3))
    tracker = log_steps(monkeypatch, tmp_path, writer, range(1, 6))
    assert writer.written == [1, 4, 5]
    assert writer.closed
    assert tracker.dropped == 2
    begins, ends = warnings_of(caplog)
    assert "OSError: network gone" in begins
    assert "without 2 lines" in ends


def test_tracker_that_cannot_be_opened_is_tried_again(monkeypatch, tmp_path):
    writer = Writer(opens_at=3)
    tracker = log_steps(monkeypatch, tmp_path, writer, range(1, 5))
    assert writer.written == [3, 4]
    assert tracker.dropped == 2


def test_tracker_that_cannot_be_closed_is_warned_of(monkeypatch, tmp_path, caplog):
    tracker = log_steps(monkeypatch, tmp_path, Writer(fails=("close",)), [1])
    assert tracker.dropped == 0
    (warned,) = warnings_of(caplog)
    assert "network gone" in warned


def test_tracker_that_hangs_holds_neither_a_step_nor_the_end_up(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    gate = threading.Event()
    writer = Writer(gate=gate)
    tracker = log_steps(monkeypatch, tmp_path, writer, range(1, 11))
    assert tracker.dropped == 10
    assert writer.written == []
    assert len([message for message in warnings_of(caplog) if "fails" in message]) == 1
    gate.set()


def test_failing_tracker_leaves_the_others_alone(monkeypatch, tmp_path):
    monkeypatch.setitem(trackers.WRITERS, "wandb", Writer(opens_at=100))
    failing, other = open_trackers(["wandb", "tensorboard"], SETTINGS, tmp_path, NAME)
    for tracker in (failing, other):
        tracker.log(1, {"loss": 1.0})
        tracker.close()
    assert (failing.dropped, other.dropped) == (1, 0)
    assert tensorboard_curve(tmp_path, "loss") == [(1, 1.0)]

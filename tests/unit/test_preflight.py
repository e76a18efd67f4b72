from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ray.exceptions import TaskUnschedulableError

from mmicl_core.errors import ConfigError
from pipelines.preflight import check_output, check_room


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--output .*file/run cannot be written: .*; name another folder"):
        check_output(tmp_path / "file" / "run", 0)


def test_disk_without_room_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500))
    check_room(tmp_path, 1_500, "it")
    with pytest.raises(ConfigError, match="has 1,500 bytes free, but it takes 1,501: make room"):
        check_room(tmp_path, 1_501, "it")


class _Answers:
    """Ray's nodes and the task that looks on each of them."""

    def __init__(self, sees: dict[str, bool | None], lost: str | None) -> None:
        self.sees, self.node, self.lost, self.asked = sees, "", lost, False

    def nodes(self) -> list[dict[str, object]]:
        return [
            {
                "Alive": not (self.asked and name == self.lost),
                "Resources": {"CPU": 4},
                "NodeID": name.encode().hex().ljust(56, "0"),
                "NodeManagerAddress": name,
            }
            for name in self.sees
        ]

    def options(self, *, scheduling_strategy: object = None, **_: object) -> _Answers:
        self.node = bytes.fromhex(getattr(scheduling_strategy, "node_id", "")).decode().rstrip("\0")
        return self

    def remote(self, mark: str) -> bool | None:
        assert Path(mark).exists()
        self.asked = True
        return self.sees[self.node]

    def get(self, answer: bool | None, timeout: float) -> bool:
        if answer is None:
            raise TaskUnschedulableError("the node does not exist any more")
        return answer


@pytest.mark.parametrize("sees", [{"10.0.0.1": True}, {"10.0.0.1": True, "10.0.0.2": True}])
def test_folder_that_all_nodes_share_is_taken(
    sees: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on(sees, monkeypatch)
    check_output(tmp_path / "run", 0)
    assert not list((tmp_path / "run").iterdir())


def test_folder_that_some_node_does_not_see_is_refused_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on({"10.0.0.1": True, "10.0.0.2": False, "10.0.0.3": True}, monkeypatch)
    with pytest.raises(ConfigError, match=r"not the same folder on all 3 nodes \(10\.0\.0\.2 sees nothing"):
        check_output(tmp_path / "run", 0)
    assert not list((tmp_path / "run").iterdir())


def test_node_that_is_lost_while_it_is_asked_takes_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _on({"10.0.0.1": True, "10.0.0.2": None}, monkeypatch, lost="10.0.0.2")
    check_output(tmp_path / "run", 0)


def test_node_that_cannot_be_asked_is_told_with_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _on({"10.0.0.1": True, "10.0.0.2": None}, monkeypatch)
    with pytest.raises(ConfigError, match=r"10\.0\.0\.2 does not answer: TaskUnschedulableError"):
        check_output(tmp_path / "run", 0)


def _on(sees: dict[str, bool | None], monkeypatch: pytest.MonkeyPatch, lost: str | None = None) -> None:
    answers = _Answers(sees, lost)
    monkeypatch.setattr("ray.nodes", answers.nodes)
    monkeypatch.setattr("ray.remote", lambda **_: lambda _: answers)
    monkeypatch.setattr("ray.get", answers.get)

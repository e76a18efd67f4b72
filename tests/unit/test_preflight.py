from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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

    def __init__(self, sees: dict[str, bool]) -> None:
        self.sees, self.node = sees, ""

    def nodes(self) -> list[dict[str, object]]:
        return [
            {
                "Alive": True,
                "Resources": {"CPU": 4},
                "NodeID": name.encode().hex().ljust(56, "0"),
                "NodeManagerAddress": name,
            }
            for name in self.sees
        ]

    def options(self, *, scheduling_strategy: object = None, **_: object) -> _Answers:
        self.node = bytes.fromhex(getattr(scheduling_strategy, "node_id", "")).decode().rstrip("\0")
        return self

    def remote(self, mark: str) -> bool:
        assert Path(mark).exists()
        return self.sees[self.node]


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


def _on(sees: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = _Answers(sees)
    monkeypatch.setattr("ray.nodes", answers.nodes)
    monkeypatch.setattr("ray.remote", lambda **_: lambda _: answers)
    monkeypatch.setattr("ray.get", lambda answer, timeout: answer)

"""What is looked at before anything is spent: where a run writes, and whether all of its machines see it."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmicl_core.errors import ConfigError

__all__ = ["check_output", "check_room"]

SHARED = "/mnt/shared, say, or whatever network filesystem all nodes mount"
WAIT_SECONDS = 60


def check_output(root: Path, needed_bytes: int) -> None:
    """Make sure that a run can write to `root` from every node.

    Args:
        needed_bytes: what its checkpoints take.

    Raises:
        ConfigError: it is not writable, has too little room, or some node does not see it.
    """
    mark = root / f".visible-{uuid.uuid4().hex[:8]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark.write_text("seen\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {root} cannot be written: {error}; name another folder") from error
    try:
        check_room(root, needed_bytes, "what the checkpoints keep (train.checkpoints)")
        _check_nodes(root, mark)
    finally:
        mark.unlink(missing_ok=True)


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Make sure that a disk has room.

    Raises:
        ConfigError: it has less than `what` takes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ConfigError(
            f"{folder} has {free:,} bytes free, but {what} takes {needed_bytes:,}: make room, or name "
            "another --output"
        )


def _check_nodes(root: Path, mark: Path) -> None:
    nodes = _nodes()
    if len(nodes) < 2:
        return
    look = ray.remote(num_cpus=0)(_sees)
    answers = {
        node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            str(mark)
        )
        for node in nodes
    }
    seen = {node: _answer(answer) for node, answer in answers.items()}
    # Those that were lost meanwhile take no part.
    left = _nodes()
    blind = [f"{address} {seen[node]}" for node, address in nodes.items() if seen[node] and node in left]
    if blind:
        raise ConfigError(
            f"--output {root} is not the same folder on all {len(nodes)} nodes ({', '.join(blind)}): name "
            f"one that all of them share, {SHARED}"
        )


def _nodes() -> dict[str, str]:
    """Addresses of the nodes that compute, by their ids."""
    alive = (node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1)
    return {node["NodeID"]: node["NodeManagerAddress"] for node in alive}


def _answer(answer: ray.ObjectRef[bool]) -> str | None:
    """What is wrong with a node, or None."""
    try:
        return None if ray.get(answer, timeout=WAIT_SECONDS) else "sees nothing of what was written here"
    except ray.exceptions.RayError as error:
        return f"does not answer: {type(error).__name__}"


def _sees(mark: str) -> bool:
    # A network filesystem may serve an old listing of a folder until the folder is read again.
    return Path(mark) in set(Path(mark).parent.iterdir())

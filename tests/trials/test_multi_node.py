"""Nodes that are cut off, killed and brought in while jobs from a laptop go on: nothing is lost, nothing is
done twice, and what comes is used. Load makes nodes, idleness removes them.

A node that is cut off goes on with what it was doing, and still writes to the storage that all of them share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

from pipelines.train import RESULT
from tests.killer import WORKER
from tests.nodes import Cluster, Host, wait_until
from tests.submitted import (
    EPISODES,
    Job,
    digests,
    drawing,
    losses,
    metrics,
    parts_made,
    same_training,
    steps_done,
    training,
)

pytestmark = [pytest.mark.trial, pytest.mark.alone, pytest.mark.timeout(900)]

PARTS = 25
FEW, STEPS, LONG = 6, 400, 1000
# Sums of gradients in another order.
LOSS = 1e-4
ELASTIC = {"min": 1, "max": 2, "look_every_seconds": 1}
DRAWER = "ray::Map"
WAYS = {"killed": Host.kill, "cut off": Host.cut}

UNUSED = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
HEAD_KIND = "ray.head.default"
# Nodes of Ray's fake provider are processes beside the head, which tell it that they are machines.
SCALING = {
    "cluster_name": "fake",
    "max_workers": 2,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
    "provider": {
        # By its class: defaults of the name that it has are not in Ray's wheel.
        "type": "external",
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "auth": {},
    "docker": {},
    "available_node_types": {
        HEAD_KIND: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    "head_node_type": HEAD_KIND,
    **{name: [] for name in UNUSED},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
}

Lose = Callable[[Host], None]


@pytest.fixture(scope="module")
def cluster(no_ray_cluster: None) -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def nodes(cluster: Cluster) -> Iterator[list[Host]]:
    """Two nodes of a CPU each; what a test puts beside them or in their place ends with it."""
    nodes = [cluster.add("one"), cluster.add("two")]
    yield nodes
    for node in nodes:
        node.kill()
    wait_until(lambda: cluster.alive() == 1, "only the head is left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all nodes share."""
    return tmp_path_factory.mktemp("shared")


def runs(node: Host, title: str) -> bool:
    return bool(node.processes(title))


@pytest.fixture(scope="module")
def drawn(cluster: Cluster, folder: Path) -> dict[str, str]:
    """The episodes of one node that nothing happens to."""
    node = cluster.add("alone")
    with Job(cluster, folder / "drawn.log", "episodes", drawing(folder), folder / "drawn") as job:
        job.end()
    node.kill()
    wait_until(lambda: cluster.alive() == 1, "only the head is left")
    return digests(folder / "drawn")


def chain(cluster: Cluster, folder: Path, name: str, workers: int) -> tuple[dict[str, Any], ...]:
    """Episodes, a training and an evaluation as one job; what each of them says that it made."""
    asking = {
        "evaluate.models": [{"name": "full"}],
        "evaluate.queries": 4,
        "evaluate.shots": [2],
        "evaluate.timed": 0,
    }
    flags = {**training(folder, workers, FEW), **drawing(folder, many=False), **asking}
    with Job(cluster, folder / f"{name}.log", "chain", flags, folder / name) as job:
        episodes, trained, asked = job.end()
    assert (episodes["read"], trained["world_size"]) == (EPISODES, workers)
    return episodes, trained, asked


def test_outputs_of_two_nodes_are_those_of_one_and_a_node_that_comes_is_used(
    cluster: Cluster, nodes: list[Host], folder: Path
) -> None:
    nodes.pop().kill()
    wait_until(lambda: cluster.alive() == 2, "one node is left")
    one = chain(cluster, folder, "one", 1)
    nodes.append(cluster.add("two"))
    # Each has a single CPU, so that two workers are on two nodes.
    two = chain(cluster, folder, "two", 2)
    made, again = ([Path(stage["folder"]) for stage in stages] for stages in (one, two))
    assert digests(made[0]) == digests(again[0])
    assert two[1]["zero_stage"] == 3
    assert losses(again[1]) == pytest.approx(losses(made[1]), rel=LOSS)
    answers, others = (
        pq.read_table(stages[2] / "predictions.parquet", columns=["question", "demonstrations", "answer"])
        for stages in (made, again)
    )
    assert answers.num_rows > 0
    assert answers == others


@pytest.mark.parametrize("lose", WAYS.values(), ids=WAYS)
def test_episodes_of_a_cluster_that_loses_a_node_are_those_of_one_node(
    drawn: dict[str, str], cluster: Cluster, nodes: list[Host], folder: Path, tmp_path: Path, lose: Lose
) -> None:
    with Job(cluster, tmp_path / "log", "episodes", drawing(folder), tmp_path / "out") as job:
        job.when(lambda: parts_made(job.output) >= PARTS and runs(nodes[1], DRAWER), "the middle")
        lose(nodes[1])
        (manifest,) = job.end()
    assert manifest["read"] == manifest["built"] + sum(manifest["skipped_by_reason"].values())
    assert digests(tmp_path / "out") == drawn


def test_node_that_comes_while_episodes_build_draws_some_of_them(
    drawn: dict[str, str], cluster: Cluster, nodes: list[Host], folder: Path, tmp_path: Path
) -> None:
    nodes.pop().kill()
    with Job(cluster, tmp_path / "log", "episodes", drawing(folder), tmp_path / "out") as job:
        job.when(lambda: parts_made(job.output) >= PARTS, "the middle")
        nodes.append(cluster.add("three"))
        job.when(lambda: runs(nodes[1], DRAWER), "work on the new node")
        job.end()
    assert digests(tmp_path / "out") == drawn


@pytest.fixture(scope="module")
def trained(cluster: Cluster, folder: Path) -> Path:
    """A training on two nodes that nothing happens to."""
    nodes = [cluster.add("first"), cluster.add("second")]
    flags = training(folder, 2, STEPS)
    with Job(cluster, folder / "trained.log", "train", flags, folder / "trained") as job:
        (manifest,) = job.end()
    for node in nodes:
        node.kill()
    wait_until(lambda: cluster.alive() == 1, "only the head is left")
    return Path(manifest["folder"])


@pytest.mark.parametrize("lose", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("number", [0, 1])
def test_training_that_loses_a_node_waits_for_another_and_ends_like_an_undisturbed_one(
    trained: Path,
    cluster: Cluster,
    nodes: list[Host],
    folder: Path,
    tmp_path: Path,
    lose: Lose,
    number: int,
) -> None:
    with Job(cluster, tmp_path / "log", "train", training(folder, 2, STEPS), tmp_path / "out") as job:
        job.when(lambda: steps_done(job.output) >= STEPS // 4, "a quarter of its steps")
        assert all(runs(node, WORKER) for node in nodes)
        # On one of them is the worker that writes everything down.
        lose(nodes[number])
        nodes.append(cluster.add("three"))
        (manifest,) = job.end()
    assert manifest["world_size"] == 2
    assert "goes on from its last checkpoint" in job.log
    same_training(Path(manifest["folder"]), trained)


@pytest.mark.parametrize("lose", WAYS.values(), ids=WAYS)
def test_elastic_training_goes_on_with_the_node_that_is_left_and_takes_the_one_that_comes(
    cluster: Cluster, nodes: list[Host], folder: Path, tmp_path: Path, lose: Lose
) -> None:
    flags = training(folder, ELASTIC, LONG, checkpoint_every=10)
    with Job(cluster, tmp_path / "log", "train", flags, tmp_path / "out") as job:
        job.when(lambda: steps_of(job.output)[-30:] == [2] * 30, "steps on two nodes")
        lose(nodes[1])
        job.when(lambda: steps_of(job.output)[-30:] == [1] * 30, "steps on the node that is left")
        nodes.append(cluster.add("three"))
        (manifest,) = job.end()
    workers = [row["workers"] for row in metrics(Path(manifest["folder"]))]
    changes = [workers[0]]
    changes += [later for before, later in zip(workers, workers[1:], strict=False) if before != later]
    assert changes == [2, 1, 2], changes


def steps_of(root: Path) -> list[int]:
    """How many workers took each of the steps that are written down."""
    for file in root.glob("train-*.work/metrics.jsonl"):
        lines = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        return [json.loads(line)["workers"] for line in lines]
    return []


def test_training_alone_on_a_node_that_is_cut_off_goes_on_elsewhere_and_nobody_writes_beside_it(
    cluster: Cluster, nodes: list[Host], folder: Path, tmp_path: Path
) -> None:
    flags = training(folder, 1, LONG)
    with Job(cluster, tmp_path / "log", "train", flags, tmp_path / "out") as job:
        job.when(lambda: steps_done(job.output) >= STEPS // 4, "a quarter of its steps")
        (busy,) = [node for node in nodes if runs(node, WORKER)]
        busy.cut()
        (manifest,) = job.end()
    with Job(cluster, tmp_path / "again.log", "train", flags, tmp_path / "again") as job:
        (again,) = job.end()
    same_training(Path(manifest["folder"]), Path(again["folder"]))
    assert (Path(manifest["folder"]) / RESULT).is_dir()


def test_load_makes_nodes_and_idleness_removes_them(no_ray_cluster: None, folder: Path) -> None:
    settings = folder / "autoscaling.json"
    settings.write_text(json.dumps(SCALING), encoding="utf-8")
    fake = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with Cluster(environment=fake, arguments=[f"--autoscaling-config={settings}"]) as cluster:
        assert cluster.alive() == 1
        flags = drawing(folder)
        with Job(cluster, folder / "scaled.log", "episodes", flags, folder / "scaled") as job:
            # The head computes nothing.
            job.when(lambda: cluster.alive() > 1, "a node more")
            (manifest,) = job.end()
        assert manifest["read"] == manifest["built"] + sum(manifest["skipped_by_reason"].values())
        wait_until(lambda: cluster.alive() == 1, "only the head is left")

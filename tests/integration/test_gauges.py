"""What a real Ray tells Prometheus, beside what the dashboards and the alerts ask for."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.run import RunConfig
from mmicl_core.config.train import TrainConfig
from pipelines.parts import Counts, run_parts
from pipelines.serve.app import APPLICATION
from pipelines.stages import Stage
from pipelines.train import train
from tests.fakes import reading, write_materials
from tests.unit.cluster.figures import asked_for, of_ray

# A second Ray on a machine may come without the agent that tells.
pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("ray_that_tells_quickly")]

# Of one metric, one sample: its labels and value.
Sample = tuple[dict[str, str], float]

PORT = 8217
SECONDS = 60.0
STORE, OBJECT = 100 * 2**20, 20 * 2**20
STEPS, BATCH = 12, 4
# What only machines tell that are not here, or only in trouble.
ONLY_ELSEWHERE = {
    "ray_node_gpus_utilization": "a GPU",
    "ray_node_gram_used": "a GPU",
    "ray_cluster_failed_nodes": "a node that failed",
}


@pytest.fixture(scope="module")
def ray_that_tells_quickly(no_ray_cluster: None) -> Iterator[None]:
    """Ten seconds are a long time for a test, and a small object store spills."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=2,
            object_store_memory=STORE,
            log_to_driver=False,
        )
        try:
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


def scrape() -> dict[str, list[Sample]]:
    """What Prometheus reads of this machine, by name."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def wait_for(holds: Callable[[dict[str, list[Sample]]], bool]) -> dict[str, list[Sample]]:
    end = time.monotonic() + SECONDS
    while not holds(found := scrape()):
        assert time.monotonic() < end, sorted(found)
        time.sleep(0.5)
    return found


def total(found: Mapping[str, list[Sample]], name: str, **labels: str) -> float:
    return sum(value for about, value in found.get(name, []) if labels.items() <= about.items())


def read_part(part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
    time.sleep(0.2)
    (folder / f"rows-{part['name']}").write_bytes(b"")
    counts = {"read": 10, "kept": 7, "skipped": {"no picture": 2, "truncated picture": 1}}
    return {f"rows-{part['name']}": 7}, counts


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, ray_that_tells_quickly: None) -> set[str]:
    """Every name that was told while a stage was made, an application served, and objects spilled."""
    names: set[str] = set()

    def looked_at(counts: Counts) -> None:
        names.update(scrape())

    parts = [{"name": f"{number:03d}", "size": 1} for number in range(40)]
    stage = Stage(tmp_path_factory.mktemp("seen"), "pairs", bench=1)
    run_parts(stage, parts, read_part, title="Reading", total=40, check=looked_at)
    serve.start(http_options={"port": PORT})
    scaled = {"min_replicas": 1, "max_replicas": 2}
    serve.run(serve.deployment(Echo).options(autoscaling_config=scaled).bind(), name=APPLICATION)
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=30) as answer:
        assert answer.read() == b"here"
    found = wait_for(
        lambda found: {"ray_serve_replica_processing_queries", "ray_node_cpu_utilization"} <= found.keys()
    )
    return names | found.keys()


class Echo:
    async def __call__(self, request: Any) -> str:
        return "here"


def test_ray_tells_every_name_that_dashboards_and_alerts_ask_it_for(seen: set[str]) -> None:
    asked = {name for name in asked_for() if of_ray(name)}
    assert len(asked) > 15
    assert sorted(asked - seen - ONLY_ELSEWHERE.keys()) == []
    assert sorted(ONLY_ELSEWHERE.keys() & seen) == []


def test_stage_tells_rows_by_reason_and_the_parts_that_are_left(seen: set[str]) -> None:
    found = wait_for(lambda found: total(found, "ray_mmicl_data_parts_total", stage="pairs") == 40)
    told = {
        name: total(found, f"ray_mmicl_data_rows_{name}_total", stage="pairs")
        for name in ("read", "kept", "skipped")
    }
    assert told == {"read": 400, "kept": 280, "skipped": 120}
    assert total(found, "ray_mmicl_data_rows_skipped_total", stage="pairs", reason="no picture") == 80
    assert "ray_mmicl_data_parts_left" in seen


def test_bytes_that_are_spilled_add_up(seen: set[str]) -> None:
    def spilled(found: dict[str, list[Sample]]) -> float:
        return total(found, "ray_spill_manager_objects_bytes", State="Spilled")

    held = [ray.put(os.urandom(OBJECT)) for _ in range(6)]
    before = spilled(wait_for(lambda found: spilled(found) >= OBJECT))
    held += [ray.put(os.urandom(OBJECT)) for _ in range(3)]
    wait_for(lambda found: spilled(found) >= before + OBJECT)
    assert total(scrape(), "ray_object_store_memory", Location="SPILLED") > 0


def test_training_tells_its_steps_seconds_and_tokens(tmp_path: Path, seen: set[str]) -> None:
    run = RunConfig(
        **reading(write_materials(tmp_path)),
        episodes=EpisodeConfig(
            stages=(ShotStage(episodes=6, min_shots_of_both_classes=2, max_shots_of_both_classes=2),)
        ),
        train=TrainConfig(steps=STEPS, global_batch=BATCH, micro_batch=2, num_workers=1),
    )
    name = train(run, tmp_path / "run").folder.name
    prefix = "ray_mmicl_train_"
    found = wait_for(lambda found: total(found, f"{prefix}steps_total", run=name) == STEPS)
    assert total(found, f"{prefix}episodes_total", run=name) == STEPS * BATCH
    for figure in ("tokens", "data_seconds", "compute_seconds", "operations"):
        assert total(found, f"{prefix}{figure}_total", run=name) > 0, figure
    assert total(found, f"{prefix}skipped_steps_total", run=name) == 0

"""Episodes a second of a second node, each node with one core of its own.

    make bench

Records seconds on one and on two nodes, episodes a second, and how many times as fast two are. The
first node is also the head, and runs the driver of the job.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.benchmarks.records import Figures
from tests.nodes import Cluster, namespaces_are_allowed
from tests.submitted import Job, drawing

EPISODES, OF_A_FILE, ROUNDS = 300_000, 2_500, 3
FASTER = 1.7
DRAWING = re.compile(r"Drawing train episodes: (\d+) s")


@pytest.mark.bench
@pytest.mark.alone
def test_second_node_gives_most_of_twice_the_episodes_a_second(
    no_ray_cluster: None, tmp_path: Path, figures: Figures
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two nodes need two cores")
    with Cluster(cpus=1, core=0) as cluster:
        one = min(seconds(cluster, tmp_path, f"one-{number}") for number in range(ROUNDS))
        cluster.add("two", core=1)
        two = min(seconds(cluster, tmp_path, f"two-{number}") for number in range(ROUNDS))
    figures.absolute("nodes with networks of their own", 2 * namespaces_are_allowed(), "nodes")
    for name, took in {"one node": one, "two nodes": two}.items():
        figures.absolute(f"{name}, least of {ROUNDS} rounds", took, "s")
        figures.absolute(name, EPISODES / took, "episodes a second")
    times_as_fast = round(one / two, 2)
    figures.ratio("two nodes, times as fast as one", times_as_fast)
    assert times_as_fast >= FASTER


def seconds(cluster: Cluster, folder: Path, name: str) -> int:
    """What the drawing of the episodes took, without what comes before it."""
    flags = {
        **drawing(folder),
        "episodes.episodes_per_file": OF_A_FILE,
        "episodes.stages": [
            {"episodes": EPISODES, "min_shots_of_both_classes": 2, "max_shots_of_both_classes": 6}
        ],
    }
    with Job(cluster, folder / f"{name}.log", "episodes", flags, folder / name) as job:
        job.end()
        found = DRAWING.search(job.log)
    assert found is not None, job.log
    return int(found[1])

"""Jobs from a laptop on a cluster whose nodes have their own addresses: what is left of a job when a node is
lost, and who is let in. More of it runs with `make trials`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import NETWORK, Cluster, namespaces_are_allowed
from tests.submitted import Job, digests, drawing, parts_made

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

PARTS = 25


@pytest.fixture(scope="module")
def cluster(no_ray_cluster: None) -> Iterator[Cluster]:
    """A head that computes nothing, and one node."""
    with Cluster() as cluster:
        cluster.add("one")
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all nodes share."""
    return tmp_path_factory.mktemp("shared")


def test_node_that_is_lost_while_episodes_build_costs_none_and_doubles_none(cluster, folder):
    flags = drawing(folder)
    lost = cluster.add("lost")
    with Job(cluster, folder / "lost.log", "episodes", flags, folder / "lost") as job:
        job.when(lambda: parts_made(folder / "lost") >= PARTS, "the middle")
        lost.kill()
        (manifest,) = job.end()
    assert manifest["read"] == manifest["built"] + sum(manifest["skipped_by_reason"].values())
    with Job(cluster, folder / "kept.log", "episodes", flags, folder / "kept") as job:
        job.end()
    assert digests(folder / "lost") == digests(folder / "kept")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RAY_AUTH_TOKEN": ""}, "wants a token and got none: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "of-somebody-else"}, "refuses the token from RAY_AUTH_TOKEN"),
    ],
    ids=["no token", "another token"],
)
def test_laptop_without_the_token_is_sent_away_in_one_sentence(cluster, folder, changes, said):
    done = cluster.submit("episodes", "--output", str(folder / "refused"), **changes)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize("where", [f"http://{NETWORK}.99:8265", "http://127.0.0.1:1"])
def test_address_that_nobody_answers_at_is_one_sentence(cluster, folder, where):
    if NETWORK in where and not namespaces_are_allowed():
        pytest.skip("whoever answers at other addresses of this machine's network is not ours to say")
    given = ["episodes", "--address", where, "--output", str(folder / "refused")]
    done = cluster.submit(*given)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"{where} does not answer" in done.stderr

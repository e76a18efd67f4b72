"""`mmicl submit` to a real cluster: a job runs the checkout, and its end is the command's end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import write_corpus

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 200
HEAD = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_port=int(sys.argv[1]))
print("up", flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def address(no_ray_cluster: None) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A job starts `python`, which on a cluster is the image's and here is this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(
        [sys.executable, "-c", HEAD, str(port)],
        env=os.environ | {"PATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == "up\n"
        # Leaving the block closes its stdin, which is what it waits for, and waits for its end.
        yield f"http://127.0.0.1:{port}"


def submit(address: str, *arguments: str, auth: str = "token") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "submit", "episodes", "--address", address, *arguments],
        cwd=ROOT,
        env=os.environ | {"RAY_AUTH_MODE": auth},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )


def test_submitted_verb_runs_on_the_cluster_and_prints_its_result(address, tmp_path):
    corpus, output = write_corpus(tmp_path / "corpus"), tmp_path / "output"
    stages = '[{"episodes": 6, "min_shots_of_both_classes": 2, "max_shots_of_both_classes": 2}]'
    small = ["--episodes.stages", stages, "--neighbours.count", "2", "--corpus.path", str(corpus)]
    done = submit(address, *small, "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads(done.stdout[done.stdout.index("{\n") :].partition("\n}")[0] + "\n}")
    assert manifest["built"] == 6
    assert Path(manifest["folder"]).is_relative_to(output)
    said = done.stderr.splitlines()
    assert any(line.startswith("mmicl: submitted ") for line in said)
    assert said[-1].endswith(" succeeded")


def test_mistake_that_only_the_cluster_can_see_is_printed_and_fails_the_command(address, tmp_path):
    done = submit(address, "--corpus.path", str(tmp_path / "nowhere"), "--output", str(tmp_path / "output"))
    assert done.returncode == 1
    assert "does not exist" in done.stdout
    assert done.stderr.splitlines()[-1].endswith(" failed")


def test_cluster_that_wants_a_token_is_one_sentence_that_says_so(address):
    done = submit(address, auth="disabled")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did not take the job: set RAY_AUTH_MODE=token" in done.stderr

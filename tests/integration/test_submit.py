"""`mmicl submit` to a real cluster with token authentication: a job runs the checkout, is left, taken up
again, stopped and repeated, and its end is the command's end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
STAGES = '[{"episodes": 6, "min_shots_of_both_classes": 2, "max_shots_of_both_classes": 2}]'
SMALL = ("--episodes.stages", STAGES, "--neighbours.count", "2")
# A token of its own, whatever lies in the home of who runs the tests.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-test-alone"}


@pytest.fixture(scope="module")
def address(no_ray_cluster: None) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A job starts `python`, which on a cluster is the image's and here is this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(
        [sys.executable, "-c", HEAD, str(port)],
        env=os.environ | TOKEN | {"PATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == "up\n"
        # Leaving the block closes its stdin, which is what it waits for, and waits for its end.
        yield f"http://127.0.0.1:{port}"


def start(address: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "submit", *arguments, "--address", address],
        cwd=ROOT,
        env=os.environ | TOKEN | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def submit(address: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    with start(address, *arguments, **environment) as process:
        try:
            out, err = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            process.kill()
    return process.returncode, out, err


def asked(address: str, *arguments: str) -> Any:
    code, out, err = submit(address, *arguments)
    assert code == 0, err
    return json.loads(out)


def results(log: str) -> list[dict]:
    """The JSON documents among the lines of a log."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := log.find("{\n", at)) >= 0:
        result, at = decoder.raw_decode(log, at)
        found.append(result)
    return found


def test_job_that_is_left_goes_on_is_taken_up_again_and_is_done_once(address, tmp_path):
    corpus, output = write_corpus(tmp_path / "corpus"), tmp_path / "output"
    command = ["episodes", *SMALL, "--corpus.path", str(corpus), "--output", str(output)]
    with start(address, *command, "--name", "first") as process:
        assert process.stdout is not None
        # Its log has begun.
        began = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 130
    assert err.splitlines()[-2] == "mmicl: submitted first"
    assert err.splitlines()[-1].startswith("mmicl: first goes on. `mmicl submit logs first --address")
    assert asked(address, "status", "first")["status"] in ("pending", "running")
    assert [job["job"] for job in asked(address, "list")] == ["first"]

    code, log, err = submit(address, "logs", "first")
    assert code == 0, log + err
    assert log.startswith(began + out)
    assert err == "mmicl: first succeeded\n"
    (manifest,) = results(log)
    assert manifest["built"] == 6
    assert Path(manifest["folder"]).is_relative_to(output)

    code, again, err = submit(address, *command)
    assert code == 0, again + err
    assert "unchanged, reused from" in again
    assert results(again) == [manifest]
    newest, first = asked(address, "list")
    assert newest["job"].startswith("mmicl-episodes-")
    assert (first["job"], first["exit_code"]) == ("first", 0)


def test_chain_is_one_job_whose_stages_follow_each_other(address, tmp_path):
    corpus, output = write_corpus(tmp_path / "corpus"), tmp_path / "output"
    paths = ["--corpus.path", str(corpus), "--output", str(output)]
    asks = ["--evaluate.queries", "4", "--evaluate.shots", "[2]"]
    code, log, err = submit(address, "episodes,evaluate", *SMALL, *asks, *paths)
    assert code == 0, log + err
    assert results(log)[0]["built"] == 6
    assert err.splitlines()[-1].endswith(" succeeded")


def test_mistake_that_only_the_cluster_can_see_gives_the_code_of_the_program(address, tmp_path):
    paths = ["--corpus.path", str(tmp_path / "nowhere"), "--output", str(tmp_path / "output")]
    code, log, err = submit(address, "episodes", *paths)
    assert code == 2
    assert "does not exist" in log
    assert err.splitlines()[-1].endswith(" failed with exit code 2")


def test_job_is_stopped_and_stays_so(address, tmp_path):
    command = ["episodes", "--output", str(tmp_path / "output"), "--detach"]
    job = asked(address, *command)["job"]
    assert asked(address, "stop", job)["status"] == "stopped"
    assert submit(address, "logs", job)[0] == 1
    assert asked(address, "stop", job)["status"] == "stopped"


def test_dry_run_tells_what_the_cluster_is(address, tmp_path):
    report = asked(address, "train", "--output", str(tmp_path), "--dry-run")
    assert report["passed"]
    ours = ".".join(map(str, sys.version_info[:3]))
    assert report["cluster"] == {"ray": version("ray"), "python": ours, "nodes": 1}


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token and got none: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "of-somebody-else"}, "refuses the token from RAY_AUTH_TOKEN"),
    ],
)
def test_cluster_that_wants_another_token_is_one_sentence_that_says_so(address, tmp_path, token, said):
    code, out, err = submit(address, "episodes", "--output", str(tmp_path), **token)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err

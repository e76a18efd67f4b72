"""A file of `mmicl serve build` on a cluster, by Ray's own `serve deploy`; and `mmicl serve` as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mmicl_core.config.run import RunConfig
from pipelines.serve import app
from tests.commands import Command
from tests.serving import BASE, FUSES, address_of, asked, free_port, replicas_of, tiny_run

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
SECONDS = 120
HEAD = """
import sys, ray
ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=int(sys.argv[1]))
print("up", flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture
def dashboard(no_ray_cluster: None) -> Iterator[str]:
    """The address that `serve deploy` takes, of a cluster that finds this checkout on its path."""
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-c", HEAD, str(port)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == "up\n"
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path)


def flags(run: RunConfig, adapters: dict[str, str]) -> list[str]:
    config = run.serve
    named = "{" + ", ".join(f'"{name}": "{folder}"' for name, folder in adapters.items()) + "}"
    return [
        *("--backbone.path", run.backbone.path, "--serve.adapters", named, "--serve.bank", config.bank),
        *("--serve.port", str(config.port), "--serve.model_name", config.model_name),
        *("--serve.max_new_tokens", "6"),
    ]


def deploy(run: RunConfig, adapters: dict[str, str], out: Path, dashboard: str) -> None:
    with Command("serve", "build", "--out", str(out), *flags(run, adapters)) as command:
        code, _, err = command.end()
        assert code == 0, err
    program = str(Path(sys.executable).parent / "serve")
    subprocess.run(
        [program, "deploy", str(out), "--address", dashboard],
        check=True,
        capture_output=True,
        timeout=SECONDS,
        env=os.environ | {"RAY_AUTH_MODE": "token"},
    )


def models(run: RunConfig) -> list[str]:
    try:
        reply = httpx.get(f"{address_of(run)}/v1/models", timeout=5)
    except httpx.TransportError:
        return []
    return [model["id"] for model in reply.json()["data"]] if reply.is_success else []


def wait_for_models(run: RunConfig, *names: str) -> None:
    deadline = time.monotonic() + SECONDS
    while models(run) != list(names):
        assert time.monotonic() < deadline, f"{models(run)} are served, not {names}"
        time.sleep(0.5)


def test_built_file_is_deployed_and_deployed_again_with_other_adapters_into_the_same_processes(
    dashboard: str, run: RunConfig, tmp_path: Path
) -> None:
    folder = run.serve.adapters["aim"]
    deploy(run, {"aim": folder}, tmp_path / "serve.yaml", dashboard)
    wait_for_models(run, BASE, FUSES)
    body = {"model": FUSES, "messages": [asked()]}
    reply = httpx.post(f"{address_of(run)}/v1/chat/completions", json=body, timeout=SECONDS)
    assert reply.json()["usage"]["completion_tokens"] == 6
    before = [process.pid for process in replicas_of(app.GENERATOR)]
    deploy(run, {"aim": folder, "more": folder}, tmp_path / "serve.yaml", dashboard)
    wait_for_models(run, BASE, FUSES, f"{BASE}@more")
    assert len(before) == 1 and [process.pid for process in replicas_of(app.GENERATOR)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_that_is_told_to_end_finishes_its_answers_and_leaves_nothing(
    no_ray_cluster: None, run: RunConfig, number: signal.Signals
) -> None:
    with Command("serve", "--output", run.serve.bank, *flags(run, dict(run.serve.adapters))) as command:
        command.wait_for_line("serving at")
        body = {"model": BASE, "messages": [asked()], "max_tokens": 600, "temperature": 1.0, "stream": True}
        url = f"{address_of(run)}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=SECONDS) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            threading.Timer(0.2, command.process.send_signal, [number]).start()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        code, _, err = command.end()
        assert code == 130, err
        assert err.splitlines()[-1] == "mmicl: stopped"
        assert "Traceback" not in err
        command.wait_until_nothing_is_left()

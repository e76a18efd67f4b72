"""HAProxy goes where whoever started it goes, and takes its port along; its own answers are the server's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from pipelines.environment import DEFAULTS
from pipelines.serve import haproxy
from pipelines.serve.errors import UnavailableError, error_body, status_of
from tests.serving import free_port

pytestmark = pytest.mark.skipif(
    DEFAULTS["RAY_SERVE_ENABLE_HA_PROXY"] == "0", reason="Ray brings no HAProxy for this system"
)

SECONDS = 20
STARTER = [sys.executable, "-c", f"from {haproxy.__name__} import main; main()"]
# It starts what it is given, as an actor of Ray does, and lives until it is killed.
PARENT = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
CONFIG = """defaults
  mode http
  timeout connect 1s
  timeout client 1s
  timeout server 1s
frontend here
  bind 127.0.0.1:{port}
"""


def wait_for_child(parent: psutil.Process, name: str) -> psutil.Process:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for child in parent.children():
            if child.name() == name and child.net_connections():
                return child
        time.sleep(0.02)
    raise AssertionError(f"no {name} was started")


def test_haproxy_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=free_port()), encoding="utf-8")
    started = [sys.executable, "-c", PARENT, *STARTER, "-db", "-f", str(config)]
    with subprocess.Popen(started, stderr=subprocess.DEVNULL) as parent:
        child = wait_for_child(psutil.Process(parent.pid), "haproxy")
        parent.kill()
    # Nobody may be there to take its exit status.
    gone, left = psutil.wait_procs([child], SECONDS)
    assert [one.pid for one in gone] == [child.pid] and not left


def test_arguments_reach_haproxy_and_its_exit_status_comes_back(tmp_path: Path) -> None:
    said = subprocess.run([*STARTER, "-v"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("HAProxy version")
    wrong = tmp_path / "haproxy.cfg"
    wrong.write_text("no such word\n", encoding="utf-8")
    done = subprocess.run([*STARTER, "-c", "-f", str(wrong)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no such word" in done.stderr or "unknown keyword" in done.stderr


@contextmanager
def haproxy_before(backends: dict[str, BackendConfig], folder: Path) -> Iterator[str]:
    """HAProxy with the configuration that Ray writes for `backends`, and its address."""
    port = free_port()
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "admin.sock"),
        metrics_port=free_port(),
        has_received_routes=True,
        is_head=True,
    )
    path = folder / "haproxy.cfg"
    HAProxyApi(config, backends, str(path))._generate_config_file_internal()
    with subprocess.Popen([*STARTER, "-db", "-f", str(path)], stderr=subprocess.DEVNULL) as running:
        try:
            wait_until_it_listens(psutil.Process(running.pid), port)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.kill()


def wait_until_it_listens(process: psutil.Process, port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while port not in [one.laddr.port for one in process.net_connections()]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


NOBODY: dict[str, dict[str, BackendConfig]] = {
    "no application yet": {},
    "no replica that listens": {
        "http-mmicl": BackendConfig(
            name="http-mmicl",
            path_prefix="/",
            app_name="mmicl",
            servers=[ServerConfig(name="replica", host="127.0.0.1", port=9)],
        )
    },
}


@pytest.mark.parametrize("backends", NOBODY.values(), ids=NOBODY.keys())
def test_who_asks_while_nobody_can_answer_is_told_to_come_again_as_the_server_would(
    backends: dict[str, BackendConfig], tmp_path: Path
) -> None:
    with haproxy_before(backends, tmp_path) as address:
        answer = httpx.get(f"{address}/v1/models")
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as error:
            client.models.list()
        assert httpx.get(f"{address}/-/routes").status_code == 200
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["retry-after"] == "1"
    assert answer.json() == {"error": error.value.body}
    assert error.value.code == "no_replica"
    assert error.value.type == "server_error"
    # As the server itself tells it.
    assert answer.json()["error"].keys() == error_body(UnavailableError("x", 1.0))["error"].keys()
    assert status_of(UnavailableError("x", 1.0)) == (503, error.value.code)

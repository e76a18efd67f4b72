"""HAProxy goes where whoever started it goes, and takes its port along."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.environment import DEFAULTS
from pipelines.serve import haproxy
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

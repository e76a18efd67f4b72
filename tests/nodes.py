"""A Ray cluster of several machines on this one: each node with its own address, processes and memory files.

A node is a set of Linux namespaces: a network that ends in a cable to a switch, processes that no other node
sees, its own `/dev/shm` and its own `/tmp/ray`. All else is the file system that they share. The switch is a
bridge in a namespace of its own, so that nothing of it reaches this machine's network, and all of it goes
with its processes. Where namespaces are not allowed, nodes are processes on 127.0.0.1 that differ in their
ports; one that is cut off is then one that stands still.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import psutil

from cluster.client import JobServer, SilentServerError
from pipelines.environment import DEFAULTS

__all__ = ["NETWORK", "ROOT", "Cluster", "Host", "Switch", "namespaces_are_allowed", "wait_until"]

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
T = TypeVar("T")
MARK = "MMICL_TEST_HOST"
NETWORK = "198.51.100"
"""Of documentation: nobody's addresses."""
GCS_PORT, DASHBOARD_PORT = 6379, 8265
OBJECT_STORE_BYTES = 256 * 2**20
START_SECONDS, COMMAND_SECONDS = 120, 280
START_LOG, STARTED = "ray-start.log", "Ray runtime started."
# Ray takes a node for lost within seconds, and not within half a minute.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
    # Workers of a machine of their own have nobody to give way to; here, all else would go first.
    "RAY_worker_niceness": "0",
}
# Its name leads to its address: gloo listens where its machine's name leads to.
# The first process of a node ends all others with it, and itself when nobody holds its standard input.
INIT = """
set -e
mount -t tmpfs -o size=1g tmpfs /dev/shm
mkdir -p /tmp/ray "$1/ray"
mount --bind "$1/ray" /tmp/ray
echo "127.0.0.1 localhost\n$3 $2" > "$1/hosts"
mount --bind "$1/hosts" /etc/hosts
hostname "$2"
ip link set lo up
echo up
cat
exit
"""
ISOLATED = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def wait_until(
    is_so: Callable[[], Any], what: str, seconds: float = START_SECONDS, every: float = 0.1
) -> Any:
    """What `is_so` gives as soon as that is something."""
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"after {seconds} s still not so: {what}"
        time.sleep(every)
    return found


@cache
def namespaces_are_allowed() -> bool:
    """Whether this machine lets us make networks; MMICL_TEST_NODES=local says that it does not."""
    if os.environ.get("MMICL_TEST_NODES") == "local" or shutil.which("ip") is None:
        return False
    tried = "ip link add name br0 type bridge && ip link add type veth && mount -t tmpfs tmpfs /dev/shm"
    with suppress(OSError):
        return (
            subprocess.run([*ISOLATED, "sh", "-c", tried], capture_output=True, check=False).returncode == 0
        )
    return False


class Switch:
    """What hosts are connected by; everything on it ends with the block."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._hosts = 0
        self._init: psutil.Process | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if namespaces_are_allowed():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="node-")))
                self._init = _isolated(stack, folder, "switch", "127.0.0.1")
                self._run("ip link add name br0 type bridge && ip link set br0 up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def host(self, name: str, core: int | None = None) -> Host:
        """Another machine; `core` is the only one that its processes run on."""
        self._hosts += 1
        if self._init is None:
            return self._stack.enter_context(Host(name, "127.0.0.1", core))
        host = Host(name, f"{NETWORK}.{self._hosts}", core)
        self._stack.enter_context(host)
        assert host.init is not None
        cable = f"cable{self._hosts}"
        self._run(
            f"ip link add {cable} type veth peer name eth0 netns {host.init.pid} && ip link set {cable} up "
            f"master br0"
        )
        host.shell(f"ip address add {host.address}/24 dev eth0 && ip link set eth0 up")
        host.cable = lambda state: self._run(f"ip link set {cable} {state}")
        return host

    def _run(self, command: str) -> None:
        assert self._init is not None
        _inside(self._init, command)


class Host:
    """A machine on a switch.

    Args:
        address: of its own.
        core: that its processes run on; any if None.
    """

    def __init__(self, name: str, address: str, core: int | None) -> None:
        self.name, self.address = name, address
        self.init: psutil.Process | None = None
        self.cable: Callable[[str], None] | None = None
        self._core = core
        self._mark = secrets.token_hex(8)
        self._started = list[subprocess.Popen[str]]()
        self._stack = ExitStack()
        self.folder = Path()

    def __enter__(self) -> Self:
        # Ray's sockets lie in it, whose paths may not be long.
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="node-")))
        if namespaces_are_allowed():
            self.init = _isolated(self._stack, self.folder, self.name, self.address)
        self._stack.callback(self.kill)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        """A process on this machine."""
        enter: list[str] = []
        if self.init is not None:
            enter = ["nsenter", "--target", str(self.init.pid), "--net", "--uts", "--mount", "--pid"]
            # Entering another mount namespace changes the working directory.
            enter.append(f"--wd={more.pop('cwd', ROOT)}")
        pinned = [] if self._core is None else ["taskset", "--cpu-list", str(self._core)]
        environment = more.pop("env", os.environ) | {MARK: self._mark}
        process = subprocess.Popen([*enter, *pinned, *command], env=environment, text=True, **more)
        self._started.append(process)
        return process

    def shell(self, command: str) -> None:
        assert self.init is not None
        _inside(self.init, command)

    def enter(self) -> None:
        """Let this thread speak from this machine's address, for the rest of its life."""
        if self.init is None:
            return
        with Path(f"/proc/{self.init.pid}/ns/net").open("rb") as network:
            if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter the network of {self.name}")

    def call(self, function: Callable[[], T]) -> T:
        """What a function gives that speaks from this machine's address."""
        with ThreadPoolExecutor(1, initializer=self.enter) as pool:
            return pool.submit(function).result()

    def processes(self, title: str = "") -> list[psutil.Process]:
        """What runs on it under a name that begins so."""
        found = []
        for process in self._all():
            with suppress(psutil.Error):
                if (process.cmdline() or [""])[0].startswith(title):
                    found.append(process)
        return found

    def cut(self) -> None:
        """Take it off the network; whatever runs on it goes on."""
        self._set_cable("down", signal.SIGSTOP)

    def heal(self) -> None:
        """Connect it again."""
        self._set_cable("up", signal.SIGCONT)

    def kill(self) -> None:
        """End all that runs on it, at once, as when the power fails."""
        if self.init is not None:
            with suppress(psutil.NoSuchProcess):
                self.init.kill()
                self.init.wait(START_SECONDS)
        else:
            while left := list(self._all()):
                for process in left:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(left, 5)
        for started in self._started:
            started.wait(START_SECONDS)

    def _set_cable(self, state: str, number: signal.Signals) -> None:
        if self.cable is not None:
            self.cable(state)
            return
        for process in self._all():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _all(self) -> Iterator[psutil.Process]:
        if self.init is not None:
            with suppress(psutil.NoSuchProcess, FileNotFoundError):
                inside = _process_namespace(self.init)
                for process in psutil.process_iter():
                    with suppress(OSError):
                        if process.pid != self.init.pid and _process_namespace(process) == inside:
                            yield process
            return
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process


class Cluster:
    """A Ray cluster behind a token, and a laptop that is no part of it.

    Args:
        cpus: of the head.
        core: that the head runs on.
        environment: of the head's processes beside the others'.
        arguments: for `ray start` of the head.
    """

    def __init__(
        self,
        cpus: int = 0,
        core: int | None = None,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self._stack = ExitStack()
        self._cpus, self._core, self._arguments = cpus, core, arguments
        self.token = secrets.token_hex(32)
        self._environment = IMPATIENT | dict(environment or {})
        self._ports = 0
        self.port, self._gcs_port = DASHBOARD_PORT, GCS_PORT

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.switch = stack.enter_context(Switch())
            self.laptop = self.switch.host("laptop")
            self.head = self.switch.host("head", self._core)
            if self.head.init is None:
                print("no namespaces on this machine: all nodes have the address 127.0.0.1")
                self.port, self._gcs_port = _free_port(), _free_port()
            self._ray_start(
                self.head,
                "--head",
                f"--port={self._gcs_port}",
                "--dashboard-host=0.0.0.0",
                f"--dashboard-port={self.port}",
                f"--num-cpus={self._cpus}",
                *self._arguments,
            )
            wait_until(self.alive, "the dashboard answers", every=0.5)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """What `--address` of `mmicl submit` and of `serve deploy` takes."""
        return f"http://{self.head.address}:{self.port}"

    def add(self, name: str, cpus: int = 1, core: int | None = None) -> Host:
        """Bring another node in."""
        host = self.switch.host(name, core)
        self._ray_start(host, f"--address={self.head.address}:{self._gcs_port}", f"--num-cpus={cpus}")
        # Counting would not tell it from one that is lost meanwhile.
        wait_until(
            lambda: STARTED in (host.folder / START_LOG).read_text(encoding="utf-8"), f"{name} is a node"
        )
        return host

    def alive(self) -> int:
        """How many nodes Ray says that there are; 0 while it does not answer."""
        server = JobServer(self.address, self.token, "", timeout=10)
        try:
            return self.laptop.call(server.nodes) or 0
        except SilentServerError:
            return 0

    def on_head(self, *command: str) -> subprocess.CompletedProcess[str]:
        where = {"RAY_ADDRESS": f"{self.head.address}:{self._gcs_port}"}
        return self._finish(self.head, command, self._nodes_environment(self.head) | where)

    def submit(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`mmicl submit` on the laptop, to its end."""
        arguments = self.submitted(*arguments)
        return self._finish(self.laptop, arguments, self.laptop_environment(**environment))

    def submitted(self, *arguments: str) -> tuple[str, ...]:
        """The command of `mmicl submit` to this cluster."""
        told = [] if "--address" in arguments else ["--address", self.address]
        return (str(BIN / "mmicl"), "submit", *arguments, *told)

    def laptop_environment(self, **environment: str) -> dict[str, str]:
        """Somebody's who has the token, and nothing else."""
        home = {"HOME": str(self.laptop.folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        return {name: value for name, value in (_plain() | home | environment).items() if value}

    def start_submit(self, *arguments: str, log: IO[str]) -> subprocess.Popen[str]:
        """`mmicl submit` on the laptop, under way."""
        env = self.laptop_environment()
        return self.laptop.start(*self.submitted(*arguments), env=env, stdout=log, stderr=subprocess.STDOUT)

    def _finish(
        self, host: Host, command: Sequence[str], env: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        with host.start(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def _nodes_environment(self, host: Host) -> dict[str, str]:
        # A job starts `python`, which on a cluster is the image's and here is this one.
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        code = {"PYTHONPATH": str(ROOT), "PATH": path, "HOME": str(host.folder)}
        if host.init is None:
            # HAProxies of several nodes then share their ports.
            code["SERVE_SOCKET_REUSE_PORT_ENABLED"] = "1"
        return _plain() | code | token | self._environment

    def _ray_start(self, host: Host, *arguments: str) -> None:
        given = [f"--object-store-memory={OBJECT_STORE_BYTES}", *arguments]
        if host.init is None:
            # One of each on a machine is what Ray expects.
            agents = ["dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent"]
            if "--head" in arguments:
                agents.append("ray-client-server")
            given += [f"--{agent}-port={_free_port()}" for agent in agents]
            given.append(f"--temp-dir={host.folder}")
        log = (host.folder / START_LOG).open("w", encoding="utf-8")
        with log:
            host.start(
                str(BIN / "ray"),
                "start",
                "--block",
                f"--node-ip-address={host.address}",
                *given,
                env=self._nodes_environment(host),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def _plain() -> dict[str, str]:
    """This environment without what it says of Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | dict(DEFAULTS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _isolated(stack: ExitStack, folder: Path, name: str, address: str) -> psutil.Process:
    """The first process in new namespaces, which end with it and with the block."""
    process = stack.enter_context(
        subprocess.Popen(
            [*ISOLATED, "sh", "-c", INIT, "sh", str(folder), name, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # It complains when its child is killed.
            stderr=subprocess.DEVNULL,
            text=True,
        )
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", "a namespace could not be made"
    (init,) = psutil.Process(process.pid).children()
    return init


def _process_namespace(process: psutil.Process) -> Path:
    return Path(f"/proc/{process.pid}/ns/pid").readlink()


def _inside(init: psutil.Process, command: str) -> None:
    subprocess.run(
        ["nsenter", "--target", str(init.pid), "--net", "--uts", "sh", "-c", command], check=True, timeout=60
    )

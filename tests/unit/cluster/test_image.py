from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
from ray._private import ray_constants

from pipelines.environment import DEFAULTS, HAPROXY_BINARY, HAPROXY_STARTER
from tests.unit.cluster.manifests import PROJECT, ROOT, pin

FILE = ROOT / "cluster" / "image" / "Dockerfile"
TEXT = FILE.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str
    stage: int


def instructions(text: str) -> list[Instruction]:
    """The file line by line; what goes before the first FROM is of stage 0."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found, stage = [], 0
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        stage += word == "FROM"
        found.append(Instruction(word, rest.strip(), stage))
    return found


def lint(text: str) -> list[str]:
    """What is wrong with a Dockerfile, in the ways that matter for nodes of a cluster."""
    told = instructions(text)
    stages = {one.rest.split()[-1] for one in told if one.word == "FROM" and " AS " in one.rest}
    arguments = dict(one.rest.split("=", 1) for one in told if one.word == "ARG" and "=" in one.rest)
    wrong = [*_bases(told, stages, arguments), *_end(told)]
    for one in told:
        if one.word == "ADD":
            wrong.append("ADD may load from the network: use COPY")
        if one.word in ("ENV", "ARG") and re.search(r"TOKEN|PASSWORD|SECRET|_KEY\b", one.rest):
            wrong.append(f"{one.rest} stays in the image for everybody to read")
        if one.word == "COPY" and one.rest.split()[-2:-1] == ["."]:
            wrong.append("COPY . copies what nobody chose")
        if one.word == "RUN":
            wrong += _run(one.rest)
    return wrong


def _bases(told, stages, arguments):
    for one in told:
        if one.word != "FROM":
            continue
        name = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), one.rest.split()[0])
        tag = name.partition("@")[0].rpartition(":")[2]
        if name not in stages and (":" not in name or tag == "latest" or not re.match(r"\d+\.\d+\.\d+", tag)):
            yield f"{name} is not pinned"


def _end(told):
    last = [one for one in told if one.stage == told[-1].stage]
    words = [one.word for one in last]
    users = [one.rest for one in last if one.word == "USER"]
    if not users or users[-1].partition(":")[0] in ("0", "root"):
        yield "the last stage runs as root"
    if "HEALTHCHECK" not in words:
        yield "nothing tells whether a container is well"
    if "ENTRYPOINT" in words:
        yield "an entry point gets in the way of Ray's launcher, which runs `bash`"


def _run(command):
    if "apt-get install" in command:
        if "--no-install-recommends" not in command:
            yield "apt-get installs more than it is asked for"
        if "rm -rf /var/lib/apt/lists/*" not in command or "apt-get update" not in command:
            yield "apt's lists stay in the layer, or are those of another one"
    if "pip install" in command:
        if "--no-cache-dir" not in command:
            yield "pip's cache stays in the layer"
        if "--constraint constraints.txt" not in command and "--no-deps" not in command:
            yield "pip chooses versions"
    if re.search(r"curl[^|]*\||wget[^|]*\| *(ba)?sh", command):
        yield "code from the network is run unseen"
    if re.search(r"\bsudo\b|chmod (-R )?777", command):
        yield "anybody may do anything"


def test_file_has_no_fault_that_the_linter_knows():
    assert lint(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("BASE=python:3.11.14-slim-bookworm", "BASE=python:latest", "not pinned"),
        ("BASE=python:3.11.14-slim-bookworm", "BASE=python:3.11-slim", "not pinned"),
        ("USER 1000:1000\n", "", "runs as root"),
        ("USER 1000:1000\n", "USER root\n", "runs as root"),
        ("HEALTHCHECK", "LABEL", "whether a container is well"),
        ("&& rm -rf /var/lib/apt/lists/*", "&& true", "apt's lists"),
        (" --no-install-recommends", "", "more than it is asked for"),
        (" --no-cache-dir", "", "pip's cache"),
        (" --constraint constraints.txt", "", "chooses versions"),
        ("COPY pyproject.toml /opt/mmicl/", "ADD https://example.com/x /opt/mmicl/", "ADD"),
        ("COPY pyproject.toml /opt/mmicl/", "COPY . /opt/mmicl/", "nobody chose"),
        ("RAY_USAGE_STATS_ENABLED=0", "RAY_AUTH_TOKEN=abc", "everybody to read"),
        ("CMD [", 'ENTRYPOINT ["mmicl"]\nCMD [', "entry point"),
        ("RUN groupadd", "RUN wget -qO- https://example.com/install | sh && groupadd", "unseen"),
    ],
)
def test_linter_finds_a_fault_that_is_put_in(old, new, fault):
    assert old in TEXT
    assert any(fault in sentence for sentence in lint(TEXT.replace(old, new)))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint is here")
def test_file_has_no_fault_that_hadolint_knows():
    done = subprocess.run(["hadolint", "--no-color", FILE], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def environment() -> dict[str, str]:
    told = " ".join(one.rest for one in instructions(TEXT) if one.word == "ENV")
    return dict(word.split("=", 1) for word in shlex.split(told))


def test_ray_is_set_up_as_programs_set_it_up_for_themselves():
    # Nodes, proxies and agents are started by no program of ours.
    expected = {name: value for name, value in DEFAULTS.items() if name.startswith("RAY_")}
    # Where pip puts commands in the image's Python.
    expected[HAPROXY_BINARY] = f"/usr/local/bin/{HAPROXY_STARTER}"
    assert {name: value for name, value in environment().items() if name.startswith("RAY_")} == expected


def test_versions_are_those_of_the_project():
    (python,) = re.findall(r"^ARG BASE=python:(\d+\.\d+)\.\d+-", TEXT, re.M)
    assert python == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert PROJECT["requires-python"] == f">={python}"
    assert set(re.findall(r"torch==([\d.]+)", TEXT)) == {pin("torch")}
    assert f'image.version="{PROJECT["version"]}-${{DEVICE}}"' in TEXT
    assert set(re.findall(r"mmicl:([\d.]+)-(?:cpu|cuda)", TEXT)) == {PROJECT["version"]}


def test_both_variants_are_stages_and_differ_in_torch_alone():
    stages = {one.rest.split()[-1] for one in instructions(TEXT) if one.word == "FROM" and " AS " in one.rest}
    assert {"torch-cpu", "torch-cuda"} <= stages
    assert "FROM torch-${DEVICE} AS" in TEXT and "ARG DEVICE=cpu" in TEXT
    cpu, cuda = (
        [
            one.rest
            for one in instructions(TEXT)
            if one.word == "RUN" and f"torch=={pin('torch')}{build}" in one.rest
        ]
        for build in ("+cpu", "")
    )
    assert len(cpu) == 1 and len(cuda) == 2 and "whl/cpu" in cpu[0]


def test_other_code_installs_no_library_anew():
    told = instructions(TEXT)
    libraries = [
        number for number, one in enumerate(told) if "pip install" in one.rest and "--no-deps" not in one.rest
    ]
    (ours,) = [number for number, one in enumerate(told) if "--no-deps" in one.rest]
    assert max(libraries) < ours
    before = " ".join(
        one.rest for one in told[: max(libraries)] if one.word == "COPY" or "--mount" in one.rest
    )
    assert not re.search(r"mmicl_core|pipelines|cluster|source", before)


def test_requirements_are_the_dependencies_of_the_project(tmp_path):
    (script,) = re.findall(r'python -c "(.*)" ', TEXT)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == PROJECT["dependencies"]


def test_health_is_asked_where_ray_and_the_server_tell_it():
    (command,) = [one.rest for one in instructions(TEXT) if one.word == "HEALTHCHECK"]
    shell, option, line = json.loads(command[command.index("[") :])
    assert (shell, option) == ("sh", "-c")
    agent = ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    assert f"127.0.0.1:{agent}/api/healthz" in line and "127.0.0.1:8000/healthz" in line
    assert re.search(r"install .*\bwget\b", TEXT)


def test_context_of_the_build_is_what_a_wheel_is_made_of():
    lines = [
        line
        for line in (FILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    setup = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "constraints.txt"}
    assert kept == setup | {"cluster/*.py", "mmicl_core", "pipelines"}
    assert {"**/.env*", "**/*.key", "**/*.pem", "**/__pycache__"} <= set(lines)

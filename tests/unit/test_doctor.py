from __future__ import annotations

import socket
from importlib.metadata import version
from pathlib import Path

import pytest

from mmicl_core.backbones.hugging_face import ROLES
from mmicl_core.errors import BackboneError
from mmicl_core.methods import METHODS
from pipelines import cli, doctor, machine
from tests.fakes import tiny_backbone
from tests.job_server import FakeJobServer


@pytest.fixture
def healthy(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "ASSETS", {"open_emoji": "split.json"})


def test_doctor_finds_nothing_wrong_where_everything_is_there(capsys, healthy, tmp_path):
    assert cli.main(["doctor", "--output", str(tmp_path), "--bank", str(tmp_path / "bank")]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert all(line.startswith(("ok    ", "note  ")) for line in told.out.splitlines())
    for said in (
        "CPUs",
        "GPUs",
        f"torch {version('torch')}",
        f"--output {tmp_path} can be written",
        f"--bank {tmp_path / 'bank'} can be written",
        "/dev/shm",
        "open files",
        "port 8000 (serve.port) is",
        "port 8265 (Ray's dashboard) is",
        "token",
        "embedded:open_emoji is there",
    ):
        assert said in told.out
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


def test_missing_asset_is_a_problem_with_a_remedy(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ASSETS", {"open_emoji": "no_such_file", "absent": "*"})
    assert cli.main(["doctor"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "mmicl: embedded:open_emoji lacks no_such_file: install the package again"
    assert lines[1].startswith("mmicl: embedded:absent is not inside the package")


def test_missing_package_is_a_problem_and_another_version_is_a_remark():
    other, missing = doctor.signs_of_versions({"numpy": "0.0.1"}, {}, ["numpy", "no-such-package"])
    assert other.says == f"numpy {version('numpy')} (tested with 0.0.1)"
    assert other.remedy is not None and not other.stops
    assert missing.says == "no-such-package is not installed"
    assert missing.stops and "pip install -c constraints.txt" in missing.remedy


def test_package_that_is_too_old_is_a_problem():
    (sign,) = doctor.signs_of_versions({}, {"numpy": "99.1"}, ["numpy"])
    assert sign.stops
    assert sign.says == f"numpy {version('numpy')} is older than 99.1, which the project needs"


def test_build_of_the_tested_version_is_no_remark():
    pins = {"torch": version("torch").partition("+")[0]}
    (sign,) = doctor.signs_of_versions(pins, pins, ["torch"])
    assert (sign.says, sign.remedy) == (f"torch {version('torch')}", None)


def test_installed_project_says_what_it_needs_where_no_constraints_lie(
    capsys, healthy, monkeypatch, tmp_path
):
    minima = doctor.read_minima()
    assert minima["ray"] >= "2.60" and minima["pydantic-settings"] >= "2"
    # Extras are no need.
    assert "spacy" not in minima
    monkeypatch.setattr(doctor, "CONSTRAINTS", tmp_path / "constraints.txt")
    assert cli.main(["doctor", "--output", str(tmp_path)]) == 0
    assert f"ok    ray {version('ray')}\n" in capsys.readouterr().out


def test_folder_that_cannot_be_written_is_a_problem(capsys, healthy, tmp_path):
    assert cli.main(["doctor", "--output", "/proc/nowhere", "--bank", "/proc/bank"]) == 2
    output, bank = capsys.readouterr().err.splitlines()
    assert output.startswith("mmicl: --output /proc/nowhere cannot be written (")
    assert bank.startswith("mmicl: --bank /proc/bank cannot be written (") and "name another folder" in bank


def test_disk_without_room_is_a_problem(capsys, healthy, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "LEAST_FREE_BYTES", 2**80)
    assert cli.main(["doctor", "--output", str(tmp_path)]) == 2
    assert "bytes free: make room" in capsys.readouterr().err


def found(says: str, tmp_path: Path) -> machine.Sign:
    (sign,) = (sign for sign in machine.signs_of_machine(str(tmp_path), None) if says in sign.says)
    return sign


def test_port_that_is_taken_is_a_remark(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(machine, "PORTS", {port: "serve.port"})
        sign = found(f"port {port} (serve.port) is taken", tmp_path)
    assert sign.remedy is not None and not sign.stops


def test_small_shared_memory_few_open_files_and_a_full_disk_are_remarks(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "STORE_SHARE", 1000.0)
    assert "--shm-size" in found("/dev/shm", tmp_path).remedy
    monkeypatch.setattr(machine, "OPEN_FILES", 2**40)
    assert "ulimit -n" in found("open files", tmp_path).remedy
    monkeypatch.setattr(machine, "FULL_SHARE", -1.0)
    assert "make room" in found("keeps its sessions", tmp_path).remedy


def test_gpus_that_torch_does_not_see_are_a_remark(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "GPUS", "null")
    monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: 0)
    assert "nvidia-smi" in found("this machine has 1 GPUs, torch sees 0", tmp_path).remedy


def test_container_has_the_memory_that_it_was_given(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000000\n")
    monkeypatch.setattr(machine, "MEMORY_LIMIT", tmp_path / "memory.max")
    assert "memory 1.0 GB" in found("/dev/shm", tmp_path).says
    (tmp_path / "memory.max").write_text("max\n")
    assert "memory 1.0 GB" not in found("/dev/shm", tmp_path).says


@pytest.mark.parametrize(
    ("addresses", "is_well"),
    [(["127.0.1.1"], False), (["::1", "127.0.0.1"], False), (["127.0.1.1", "192.0.2.7"], True), ([], False)],
)
def test_name_that_leads_no_other_machine_here_is_a_remark(monkeypatch, tmp_path, addresses, is_well):
    def look_up(*_):
        if not addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(None, None, None, "", (one, 0)) for one in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    sign = found("name, ", tmp_path)
    assert (sign.remedy is None) == is_well
    assert all(one in sign.says for one in addresses)
    assert is_well or "GLOO_SOCKET_IFNAME" in sign.remedy


def test_token_is_told_by_where_it_is_and_never_itself(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("no token for a cluster", tmp_path).remedy is None
    file = tmp_path / "token"
    file.write_text("t0")
    file.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert found("a token for a cluster", tmp_path).says.endswith(f", from {file}")
    file.chmod(0o644)
    assert found("can be read by others", tmp_path).remedy == f"chmod 600 {file}"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert found("RAY_AUTH_TOKEN_PATH=", tmp_path).stops


def test_cluster_with_another_ray_is_a_problem_that_names_both(capsys, healthy, tmp_path):
    doctor_of = ["doctor", "--output", str(tmp_path), "--address"]
    with FakeJobServer() as server:
        assert cli.main([*doctor_of, server.address]) == 0
        assert f"ok    ray: {version('ray')} on both sides\n" in capsys.readouterr().out
        server.ray = "2.61.0"
        assert cli.main([*doctor_of, server.address]) == 2
        said = capsys.readouterr().err
        assert f"runs Ray 2.61.0, and Ray {version('ray')} is installed here: give both" in said
    assert cli.main([*doctor_of, "http://127.0.0.1:1"]) == 2
    assert "does not answer (" in capsys.readouterr().err


def test_stack_is_pinned():
    assert set(doctor.STACK) <= set(doctor.read_pins(doctor.CONSTRAINTS))


def test_backbone_is_described_by_role(capsys, healthy, tmp_path):
    backbone = tiny_backbone()
    backbone.save(tmp_path / "model")
    assert cli.main(["doctor", "--backbone", str(tmp_path / "model")]) == 0
    told = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in backbone.parameters())
    assert f"llava, decoder, width 32, vision width 32, {total:,} parameters" in told
    family, parts = backbone.family, 0
    paths = (family.vision_tower, *family.projector, family.language_model, family.head)
    for role, path in zip(ROLES, paths, strict=True):
        parameters = sum(parameter.numel() for parameter in getattr(backbone, role).parameters())
        # The head is the matrix of the embeddings, which is counted once.
        said = f"{parameters:,} parameters" if role != "head" else "0 parameters, tied to the embeddings"
        assert f"  {role:<15} {path}: {said}\n" in told
        parts += parameters if role != "head" else 0
    assert parts == total


def test_doctor_tells_what_each_method_would_train_of_a_backbone(capsys, healthy, tmp_path):
    backbone = tiny_backbone()
    backbone.save(tmp_path / "model")
    assert cli.main(["doctor", "--backbone", str(tmp_path / "model")]) == 0
    told = capsys.readouterr().out
    for name in METHODS:
        assert f"\n  {name:<15} trains " in told
    width, total = backbone.width, sum(parameter.numel() for parameter in backbone.parameters())
    tower = sum(parameter.numel() for parameter in backbone.vision_tower.parameters())
    # A projection with its LayerNorm, soft tokens, all but the tower.
    expected = {"aim": width * width + 3 * width, "prompt_tuning": 20 * width, "lcl": total - tower}
    for name, trained in expected.items():
        assert f"\n  {name:<15} trains {trained:,} parameters, {trained / total:.2%}" in told


def test_folder_that_is_no_backbone_is_a_mistake(capsys, healthy, tmp_path):
    with pytest.raises(BackboneError):
        doctor.examine(str(tmp_path), str(tmp_path))
    assert cli.main(["doctor", "--backbone", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err

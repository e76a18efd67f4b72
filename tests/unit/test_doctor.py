from __future__ import annotations

from importlib.metadata import version

import pytest

from mmicl_core.backbones.hugging_face import ROLES
from mmicl_core.errors import BackboneError
from mmicl_core.methods import METHODS
from pipelines import cli, doctor
from tests.fakes import tiny_backbone


@pytest.fixture
def healthy(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "ASSETS", {"open_emoji": "split.json"})


def test_doctor_finds_nothing_wrong_where_everything_is_there(capsys, healthy):
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert f"torch {version('torch')}" in told.out
    assert "CPUs" in told.out
    assert "GPUs" in told.out
    assert "embedded:open_emoji is there" in told.out


def test_missing_asset_is_a_problem_with_a_remedy(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ASSETS", {"open_emoji": "no_such_file", "absent": "*"})
    assert cli.main(["doctor"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "mmicl: embedded:open_emoji lacks no_such_file: install the package again"
    assert lines[1].startswith("mmicl: embedded:absent is not inside the package")


def test_missing_package_is_a_problem_and_another_version_is_a_remark():
    lines, problems = doctor.version_lines({"numpy": "0.0.1"}, ["numpy", "no-such-package"])
    assert lines == [f"numpy {version('numpy')} (tested with 0.0.1)"]
    assert problems == ["no-such-package is not installed: pip install -c constraints.txt mmicl"]


def test_build_of_the_tested_version_is_no_remark():
    pins = {"torch": version("torch").partition("+")[0]}
    assert doctor.version_lines(pins, ["torch"])[0] == [f"torch {version('torch')}"]


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
        doctor.examine(str(tmp_path))
    assert cli.main(["doctor", "--backbone", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err

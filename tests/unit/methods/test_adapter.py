from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmicl_core.config.model import AimConfig, LclConfig, LoraConfig, PromptTuningConfig
from mmicl_core.errors import CheckpointError
from mmicl_core.methods import build_method, load_method, read_settings
from mmicl_core.methods.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_identity, load_parameters
from tests.fakes import tiny_backbone
from tests.methods import make_method


def test_saved_adapter_remembers_the_method_the_model_and_what_the_run_tells(tmp_path: Path) -> None:
    method = make_method("lora", tiny_backbone())
    method.save(tmp_path, {"backbone_name": "models/tiny", "code": "abc", "metrics": {"loss_last": 0.5}})
    about = json.loads((tmp_path / CONFIG_FILE).read_text(encoding="utf-8"))
    assert about["method"] == "lora" and about["settings"]["rank"] == 2
    assert (about["backbone"], about["model_type"], about["width"]) == ("tiny-0", "llava", 32)
    assert about["backbone_name"] == "models/tiny" and about["metrics"] == {"loss_last": 0.5}
    assert about["parameters"].keys() == method.trainable().keys()
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


def test_training_goes_on_from_a_saved_adapter(tmp_path: Path) -> None:
    for name, again in (
        ("lora", LoraConfig(rank=2, start=str(tmp_path / "lora"))),
        ("prompt_tuning", PromptTuningConfig(tokens=3, start=str(tmp_path / "prompt_tuning"))),
        ("aim", AimConfig(start=str(tmp_path / "aim"))),
    ):
        first = make_method(name, tiny_backbone())
        first.save(tmp_path / name, {})
        second = build_method(tiny_backbone(), again).trainable()
        assert second.keys() == first.trainable().keys()
        assert all(torch.equal(second[key], value) for key, value in first.trainable().items())
        assert all(parameter.requires_grad for parameter in second.values())


def test_updates_of_link_context_learning_are_kept_without_the_model(tmp_path: Path) -> None:
    method = build_method(tiny_backbone(), LclConfig(lora_rank=2))
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.normal_()
    method.save(tmp_path, {})
    trained = method.trainable()
    assert any("lora_A" in name for name in trained)
    assert {name.partition("model.model.")[2].partition(".")[0] for name in trained} == {
        "language_model",
        "multi_modal_projector",
    }
    loaded = load_method(tmp_path, tiny_backbone())
    found = dict(loaded.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    assert not loaded.trainable()


def test_adapter_of_other_weights_of_the_same_kind_is_refused(tmp_path: Path) -> None:
    make_method("aim", tiny_backbone(0)).save(tmp_path, {})
    with pytest.raises(CheckpointError, match="backbone 'tiny-0', here it is 'tiny-1'"):
        load_method(tmp_path, tiny_backbone(1))


def test_adapter_of_other_settings_is_refused_with_the_first_parameter_that_differs(tmp_path: Path) -> None:
    make_method("prompt_tuning", tiny_backbone()).save(tmp_path, {})
    other = build_method(tiny_backbone(), PromptTuningConfig(tokens=5))
    with pytest.raises(CheckpointError, match=r"embedding.weight is \(3, 32\) there, \(5, 32\) here"):
        load_parameters(other, tmp_path)


def test_folder_without_an_adapter_and_one_that_is_torn_are_refused(tmp_path: Path) -> None:
    for look in (read_settings, adapter_identity):
        with pytest.raises(CheckpointError, match=f"holds no adapter: it has no {CONFIG_FILE}"):
            look(tmp_path)
    make_method("aim", tiny_backbone()).save(tmp_path, {})
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_method(tmp_path, tiny_backbone())
    (tmp_path / CONFIG_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_settings(tmp_path)
    (tmp_path / CONFIG_FILE).write_text('{"settings": {"type": "magic"}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="of no known method"):
        read_settings(tmp_path)


def test_identity_of_an_adapter_changes_with_its_weights_and_with_what_they_fit(tmp_path: Path) -> None:
    for number, seed in enumerate((0, 0, 1)):
        make_method("aim", tiny_backbone(), seed).save(tmp_path / str(number), {})
    first, same, other = (adapter_identity(tmp_path / str(number)) for number in range(3))
    assert first == same != other

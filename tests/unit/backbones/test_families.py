from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmicl_core.backbones.families import FAMILIES, Family, family_in, family_of, part
from mmicl_core.backbones.hugging_face import ROLES
from mmicl_core.errors import BackboneError
from tests.fakes import tiny_backbone


def _config(model_type: str, text_type: str | None = None) -> Any:
    text_config = SimpleNamespace(model_type=text_type) if text_type is not None else None
    return SimpleNamespace(model_type=model_type, text_config=text_config)


def test_a_model_finds_its_parts_and_together_they_are_the_whole_model() -> None:
    backbone = tiny_backbone()
    assert family_of(backbone.model.config) is backbone.family
    assert backbone.family.model_type == "llava"
    roles = (backbone.vision_tower, backbone.projector, backbone.language_model, backbone.head)
    parts = {id(parameter) for role in roles for parameter in role.parameters()}
    assert parts == {id(parameter) for parameter in backbone.model.parameters()}
    named = [name for role in ROLES for name, _ in backbone.role_parameters(role)]
    assert sorted(named) == sorted(name for name, _ in backbone.model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda row: "/".join((row.model_type, *row.text_types)))
def test_every_row_is_found_by_the_types_of_the_model_and_of_its_language_model(
    family: Family, tmp_path: Path
) -> None:
    for text_type in family.text_types or ("llama", "qwen2"):
        assert family_of(_config(family.model_type, text_type)) is family
        told = {"model_type": family.model_type, "text_config": {"model_type": text_type}}
        (tmp_path / "config.json").write_text(json.dumps(told), encoding="utf-8")
        assert family_in(tmp_path) is family


def test_unknown_family_is_told_where_to_add_a_row_and_which_there_are() -> None:
    match = r"'qwen' .* has no row in mmicl_core/backbones/families.py \(known: llava, .*blip-2/t5\): add one"
    with pytest.raises(BackboneError, match=match):
        family_of(_config("qwen"))


def test_known_model_around_an_unknown_language_model_is_refused_with_both_types() -> None:
    with pytest.raises(BackboneError, match="'blip-2' with a language model of type 'gpt2' has no row"):
        family_of(_config("blip-2", "gpt2"))


@pytest.mark.parametrize("text", [None, "{", ""], ids=["absent", "torn", "empty"])
def test_folder_without_a_readable_configuration_has_no_family(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(BackboneError, match=r"is not a model folder: its config\.json cannot be read"):
        family_in(tmp_path)


def test_missing_part_is_named_with_those_that_exist() -> None:
    model = tiny_backbone().model
    with pytest.raises(BackboneError, match=r"model has no 'tower', it has \['language_model'"):
        part(model, "model.tower")

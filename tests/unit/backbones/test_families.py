from __future__ import annotations

import pytest

from mmicl_core.backbones.families import FAMILIES, family_of, part
from mmicl_core.errors import BackboneError
from tests.fakes import tiny_backbone


@pytest.mark.parametrize("family", FAMILIES.values())
def test_every_family_finds_its_parts_and_together_they_are_the_whole_model(family: object) -> None:
    backbone = tiny_backbone()
    assert family_of(backbone.model.config.model_type) is family
    roles = (backbone.vision_tower, backbone.projector, backbone.language_model, backbone.head)
    parts = {id(parameter) for role in roles for parameter in role.parameters()}
    assert parts == {id(parameter) for parameter in backbone.model.parameters()}


def test_unknown_family_is_told_where_to_add_a_row() -> None:
    with pytest.raises(BackboneError, match=r"'qwen' has no row in mmicl_core/backbones/families.py"):
        family_of("qwen")


def test_missing_part_is_named_with_those_that_exist() -> None:
    model = tiny_backbone().model
    with pytest.raises(BackboneError, match=r"model has no 'tower', it has \['language_model'"):
        part(model, "model.tower")

"""Where each family of Hugging Face models keeps its parts. A new family is one row.

A path is followed from the top object that `AutoModelForImageTextToText` returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mmicl_core.errors import BackboneError

__all__ = ["FAMILIES", "Family", "family_of", "part"]


@dataclass(frozen=True)
class Family:
    """One model type and the module paths of its roles."""

    model_type: str
    vision_tower: str
    projector: str
    language_model: str
    head: str


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llava",
            vision_tower="model.vision_tower",
            projector="model.multi_modal_projector",
            language_model="model.language_model",
            head="lm_head",
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The table row of a model type.

    Raises:
        BackboneError: there is none.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise BackboneError(
            f"model type {model_type!r} has no row in mmicl_core/backbones/families.py (known: {known}): "
            "add one that says where its vision tower, projector, language model and head are"
        )
    return FAMILIES[model_type]


def part(model: nn.Module, path: str) -> nn.Module:
    """Follow a module path.

    Raises:
        BackboneError: it ends early; says where and which parts exist there.
    """
    module = model
    for depth, name in enumerate(path.split(".")):
        children = dict(module.named_children())
        if name not in children:
            where = ".".join(path.split(".")[:depth]) or type(model).__name__
            raise BackboneError(f"looked for {path!r}: {where} has no {name!r}, it has {sorted(children)}")
        module = children[name]
    return module

"""Methods as the tests build them, small, and the rows that they are asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import MethodConfig
from mmicl_core.methods import build_method
from mmicl_core.methods.base import Method
from tests.fakes import episode_row

__all__ = ["METHOD_NAMES", "answered", "batch_rows", "make_method", "unanswered"]

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "aim": {},
    "mmict": {"queries": 3, "width": 16, "layers": 2, "heads": 2, "hidden": 32},
    "m2pt": {"visual_prompts": 2, "textual_prompts": 3},
    "lcl": {},
    "lora": {"rank": 2},
    "prompt_tuning": {"tokens": 3},
    "mtv": {},
}
METHOD_NAMES = tuple(SETTINGS)


def make_method(name: str, backbone: HuggingFaceBackbone, seed: int = 0) -> Method:
    """A method of small size whose own parameters are random, also where training begins at zero."""
    config: MethodConfig = TypeAdapter(MethodConfig).validate_python({"type": name, **SETTINGS[name]})
    torch.manual_seed(seed)
    method = build_method(backbone, config)
    if not method.changes_backbone or name == "lora":
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in method.trainable().values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return method.eval()


def batch_rows() -> list[dict[str, Any]]:
    """Two episodes of different lengths over the pictures a to d."""
    return [answered(list("abc"), ["bako", "mute", "bako"]), answered(list("db"), ["red", "blue"])]


def answered(pictures: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """An episode; without pictures, one question about none."""
    row = episode_row(list(pictures) or [""], list(names))
    for turn in row["turns"]:
        turn["picture"] = turn["picture"] or None
    return row


def unanswered(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same, asked."""
    return [{**row, "turns": [*row["turns"][:-1], {**row["turns"][-1], "answer": None}]} for row in rows]

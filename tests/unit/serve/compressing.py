"""Compressors of a tiny model, and what is asked of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.bank import Demonstration
from mmicl_core.config.model import AimConfig, PromptTuningConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.methods.adapter import adapter_identity
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.prompt_tuning import PromptTuning
from pipelines.serve import compressor as compressor_module
from pipelines.serve import fusing
from pipelines.serve.compressor import Compressor
from tests.fakes import draw_picture, encode_picture, tiny_backbone

MAX_PIXELS = 10_000
AIM = "nano@aim"
VISUAL_TOKENS = 25
"""Of a picture."""

Make = Callable[..., Compressor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `backbone`, and adapters that fuse (`aim`) and do not (`soft`)."""
    folder = tmp_path_factory.mktemp("model")
    tiny_backbone().save(folder / "backbone")
    save_aim(folder, "aim", seed=0)
    soft = PromptTuning(load_backbone(folder / "backbone"), PromptTuningConfig(tokens=2))
    soft.save(folder / "soft", {})
    return folder


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Iterator[Make]:
    """Makes compressors with settings of the server; they are closed afterwards."""
    made = list[Compressor]()

    def build(put: Any = None, **settings: Any) -> Compressor:
        given = {"bank": str(tmp_path / "bank"), "max_image_pixels": MAX_PIXELS, "batch_wait_ms": 0}
        config = ServeConfig(**given | settings)
        made.append(Compressor(model / "backbone", config, *([] if put is None else [put])))
        asyncio.run(made[-1].reconfigure(user_config(aim=model / "aim", soft=model / "soft")))
        return made[-1]

    yield build
    for one in made:
        one.close()


def save_aim(folder: Path, name: str, seed: int) -> None:
    """An adapter that was not trained, another one for each seed."""
    torch.manual_seed(seed)
    method = Aim(load_backbone(folder / "backbone"), AimConfig())
    torch.nn.init.normal_(method.aggregator.projection.weight)
    method.save(folder / name, {})


def together(count: int) -> dict[str, Any]:
    """Settings of a compressor that waits until so many demonstrations of one picture can share a pass."""
    return {"batch_wait_ms": 60_000, "batch_image_tokens": count * VISUAL_TOKENS}


def user_config(**adapters: Path) -> dict[str, Any]:
    """As Ray Serve hands it over."""
    return {
        "adapters": {
            name: {"folder": str(folder), "identity": adapter_identity(folder)}
            for name, folder in adapters.items()
        }
    }


def demonstrations(count: int, first: int = 0) -> list[Demonstration]:
    """Pictures with names of several lengths."""
    return [
        Demonstration((encode_picture(draw_picture(seed)),), "This is", "bako" * (1 + seed % 3))
        for seed in range(first, first + count)
    ]


class Passes:
    """Remembers how many demonstrations each pass of the model read; may refuse some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.refuse: Callable[[fusing.Laid], bool] = lambda laid: False
        monkeypatch.setattr(compressor_module, "read_demonstrations", self)

    def __call__(self, laid: Sequence[fusing.Laid]) -> list[Any]:
        self.sizes.append(len(laid))
        if any(map(self.refuse, laid)):
            raise RuntimeError("out of memory")
        return fusing.read_demonstrations(laid)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """The passes of all compressors."""
    return Passes(monkeypatch)

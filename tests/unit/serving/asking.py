"""Jobs for engines under test, and what they are told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.methods.base import Method
from mmicl_core.prompts import Turn
from mmicl_core.serving.engine import Engine
from mmicl_core.serving.jobs import Begun, Ended, Grown, Job
from mmicl_core.serving.sampling import Sampling
from tests.fakes import draw_picture

__all__ = ["MEGABYTE", "MOST", "Told", "alone", "job", "pictures", "question", "run"]

MOST = 6
MEGABYTE = 2**20


@dataclass
class Told:
    """What a job was told."""

    begun: list[Begun] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[int, Ended] = field(default_factory=dict)
    likelihoods: list[Any] = field(default_factory=list)

    def __call__(self, event: Begun | Grown | Ended) -> None:
        if isinstance(event, Begun):
            self.begun.append(event)
        elif isinstance(event, Grown):
            assert event.index not in self.ended
            self.tokens[event.index].append(event.token)
            self.likelihoods.append(event.likelihood)
        else:
            assert event.index not in self.ended
            self.ended[event.index] = event


def question(seed: int, shots: int) -> tuple[Turn, ...]:
    """Demonstrations of other lengths for each seed, and a query."""
    asked = ["What is this" + "?" * (seed + place) for place in range(shots)]
    shown = [Turn(("ab"[place % 2],), words, f"bako {seed}") for place, words in enumerate(asked)]
    return (*shown, Turn(("c",), "And this" + "?" * seed, None))


@cache
def pictures(backbone: HuggingFaceBackbone) -> Mapping[str, PreparedPicture]:
    drawn = [draw_picture(seed, 40 + 10 * seed) for seed in range(3)]
    return dict(zip("abc", backbone.prepare(drawn), strict=True))


def job(method: Method, seed: int, shots: int, told: Told, **more: Any) -> Job:
    samplings = more.pop("samplings", (Sampling(MOST),))
    given = more.pop("pictures", pictures(method.backbone))
    return Job(method, question(seed, shots), given, samplings, told, **more)


def run(engine: Engine) -> None:
    for _ in range(500):
        if engine.idle:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def alone(method: Method, seed: int, shots: int) -> list[int]:
    batch = method.arrange([question(seed, shots)], pictures(method.backbone), "left")
    with torch.no_grad():
        return method.answer(batch, MOST)[0]

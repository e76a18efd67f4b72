"""What fused demonstrations save: time of reading a prompt, full against fused, in one run.

    make bench

Prints one JSON object for each number of shots: the ratio of the median times, full / fused, with the
spread of the ratio over the repetitions, and the ratio of the prompt lengths beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.data.collate import Packed, pack
from mmicl_core.methods.aim import fused_prompt
from mmicl_core.methods.base import prompt_embeddings
from mmicl_core.methods.lcl import full_prompt
from mmicl_core.prompts import ChatFormat, Turn

REPETITIONS = 15
TEXT_TOKENS = 6


def read_time(
    backbone: HuggingFaceBackbone, packed: Packed, pictures: int, fused: int
) -> Callable[[], float]:
    vision_NVW = torch.randn(pictures, backbone.visual_tokens, backbone.vision_width)
    fused_TD = [torch.randn(TEXT_TOKENS, backbone.width) for _ in range(fused)]

    @torch.no_grad()
    def measure() -> float:
        start = time.perf_counter()
        hidden = backbone.hidden(prompt_embeddings(backbone, packed, vision_NVW, fused_TD), packed.mask_BL)
        backbone.logits(hidden[:, -1])
        return time.perf_counter() - start

    return measure


@pytest.mark.bench
@pytest.mark.parametrize("shots_per_class", [1, 2, 4, 8])
def test_fused_prompts_are_read_faster_than_full_ones_by_a_ratio(shots_per_class: int) -> None:
    backbone = load_backbone(resolve("embedded:nano"))
    chat, count = ChatFormat(backbone.processor), 2 * shots_per_class
    shown = [Turn("p", "This is", "bako")] * count
    query = Turn("p", "This is", None)
    padding, visual = backbone.tokenizer.pad_token_id, backbone.visual_tokens
    full = pack([full_prompt(chat, [*shown, query])], visual_tokens=visual, padding_id=padding)
    fused = pack(
        [fused_prompt(chat, count, query)],
        visual_tokens=visual,
        fused_tokens=[[TEXT_TOKENS] * count],
        padding_id=padding,
    )
    read_full = read_time(backbone, full, count + 1, 0)
    read_fused = read_time(backbone, fused, 1, count)
    ratios = [read_full() / read_fused() for _ in range(REPETITIONS)]
    result = {
        "shots_per_class": shots_per_class,
        "time_ratio": round(median(ratios), 2),
        "time_ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "length_ratio": round(full.ids_BL.shape[1] / fused.ids_BL.shape[1], 2),
    }
    print(json.dumps(result))
    assert result["length_ratio"] > 1

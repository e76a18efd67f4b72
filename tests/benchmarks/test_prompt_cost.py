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
from PIL import Image

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.data.collate import Packed, pack
from mmicl_core.prompts import Turn, count_text

REPETITIONS = 15
TEXT_TOKENS = 6


def read_time(
    backbone: HuggingFaceBackbone, packed: Packed, pictures: int, fused: int
) -> Callable[[], float]:
    states_NVW = torch.randn(pictures, int(packed.image_BL.sum()) // pictures, backbone.vision_width)
    fused_TD = torch.randn(TEXT_TOKENS * fused, backbone.width) if fused else None

    @torch.no_grad()
    def measure() -> float:
        start = time.perf_counter()
        visual = backbone.projector(states_NVW).flatten(0, 1)
        hidden = backbone.read(backbone.embed(packed, visual, fused_TD)).last_hidden_state
        backbone.logits(hidden[:, -1])
        return time.perf_counter() - start

    return measure


@pytest.mark.bench
@pytest.mark.parametrize("shots_per_class", [1, 2, 4, 8])
def test_fused_prompts_are_read_faster_than_full_ones_by_a_ratio(shots_per_class: int) -> None:
    backbone = load_backbone(resolve("embedded:nano"))
    chat, count = backbone.chat, 2 * shots_per_class
    shown = [Turn(("p",), "This is", "bako")] * count
    query = Turn(("p",), "This is", None)
    assert count_text(chat.turn(shown[0])) == TEXT_TOKENS
    padding = backbone.tokenizer.pad_token_id
    (prepared,) = backbone.prepare([Image.new("RGB", (72, 72), "red")])
    full = pack([chat.conversation([*shown, query])], pictures=[prepared] * (count + 1), padding_id=padding)
    fused = pack(
        [chat.conversation([query], count)],
        pictures=[prepared],
        fused_tokens=[TEXT_TOKENS] * count,
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

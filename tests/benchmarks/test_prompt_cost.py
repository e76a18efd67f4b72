"""What fused demonstrations save, full against fused in one run: time of reading a prompt, and bytes of what
is kept of it.

    make bench

Records for each number of shots the ratio of the times, full over fused, with its spread over the
repetitions, and the ratio of the prompt lengths beside it; bytes of the keys and values of demonstrations in
a server, and their tokens. Lengths and bytes are counted, so they gate closely. The longest prompts gate by
their times too, with room: beside 5 to 16 other processes on two cores, medians were 2.7 to 3.7.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.data.collate import Packed, pack
from mmicl_core.methods.base import Plain
from mmicl_core.prompts import Turn, count_text
from mmicl_core.serving.engine import Engine
from mmicl_core.serving.jobs import Job
from mmicl_core.serving.prefixes import Prefix
from mmicl_core.serving.sampling import Sampling
from tests.benchmarks.records import Figures

REPETITIONS = 15
COUNTED = 0.99
# By number of shots: where reading takes long enough to be told from its noise.
TIMED = {8: 0.5}
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
@pytest.mark.gate
@pytest.mark.parametrize("shots_per_class", [1, 2, 4, 8], ids="shots per class {}".format)
def test_fused_prompts_are_read_faster_than_full_ones_by_a_ratio(
    shots_per_class: int, figures: Figures
) -> None:
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
    length_ratio = full.ids_BL.shape[1] / fused.ids_BL.shape[1]
    figures.ratio("time, full over fused", ratios, gate=TIMED.get(shots_per_class))
    figures.ratio("tokens, full over fused", length_ratio, gate=COUNTED)
    assert length_ratio > 1


@torch.no_grad()
def prefix_of(backbone: HuggingFaceBackbone, shown: list[Turn], fused: tuple[torch.Tensor, ...]) -> Prefix:
    engine, pictures = Engine(backbone, 1, 2**30), backbone.prepare([Image.new("RGB", (72, 72), "red")])
    asked = (*shown, Turn((), "This is", None))
    engine.add(
        Job(Plain(backbone), asked, {"p": pictures[0]}, (Sampling(1),), lambda _: None, fused, prefix="it")
    )
    while not engine.idle:
        engine.step()
    found = engine.prefixes.get("it")
    assert found is not None
    return found


# Fewer are computed anew in less time than it takes to look them up.
@pytest.mark.bench
@pytest.mark.gate
@pytest.mark.parametrize("shots_per_class", [2, 4, 8], ids="shots per class {}".format)
def test_keys_and_values_of_fused_demonstrations_take_as_many_bytes_as_their_tokens_say(
    shots_per_class: int, figures: Figures
) -> None:
    backbone, count = load_backbone(resolve("embedded:nano")), 2 * shots_per_class
    full = prefix_of(backbone, [Turn(("p",), "This is", "bako")] * count, ())
    fused = prefix_of(backbone, [], (torch.randn(TEXT_TOKENS, backbone.width),) * count)
    ratios = {"bytes": full.nbytes / fused.nbytes, "tokens": full.length / fused.length}
    for name, one in {"full": full, "fused": fused}.items():
        figures.absolute(f"bytes, {name}", one.nbytes, "bytes")
        figures.absolute(f"tokens, {name}", one.length, "tokens")
    for name, ratio in ratios.items():
        figures.ratio(f"{name}, full over fused", ratio, gate=COUNTED)
    assert ratios["bytes"] == pytest.approx(ratios["tokens"], rel=0.01)
    assert ratios["bytes"] > 3

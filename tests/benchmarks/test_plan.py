"""How near the planned memory of training comes to what a process takes: AIM in fp32 on one CPU thread.

    make bench

Records for each model the mebibytes predicted and measured, and their ratio. Measured is the most
that the process holds in two steps (`VmHWM`), less what it held with everything imported and another model
trained for a step. The larger model has the shape of SmolLM2-135M and random weights.

What is measured is memory in use: blocks from 64 KiB on go back when they are freed. Left to itself, glibc
keeps freed blocks of up to 32 MiB between others in use; what a process then takes is recorded beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.config.model import AimConfig
from mmicl_core.config.train import TrainConfig
from mmicl_core.methods import build_method
from mmicl_core.methods.aim import Aim, AimBatch, Demonstrations
from mmicl_core.methods.base import episode_turns
from mmicl_core.training.hardware import Hardware
from mmicl_core.training.memory import PromptShape, activations, spread
from tests.benchmarks.records import Figures
from tests.fakes import random_pictures, tiny_backbone
from tests.methods import answered

ROOT = Path(__file__).parents[2]
# Episodes of a micro-batch, and how many of their demonstrations are written out in full.
SIZES = {"nano": (48, 12), "135M": (4, 12)}
STEPS, MOST = 2, 0.15
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PROGRAM = "import sys; from tests.benchmarks.test_plan import train; train(sys.argv[1])"
SMOL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def shaped_like_smol(**changes: int) -> HuggingFaceBackbone:
    processor = tiny_backbone().processor
    tokenizer = processor.tokenizer
    ends = {
        name: tokenizer.convert_tokens_to_ids(getattr(tokenizer, name.removesuffix("_id")))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=70, patch_size=14),
        text_config=LlamaConfig(**SMOL | changes, **ends),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return HuggingFaceBackbone(LlavaForConditionalGeneration(config), processor, identity="135M")


def make_batch(method: Aim, episodes: int, raw: int) -> AimBatch:
    names = ["bako", "mute"]
    rows = [episode_turns(answered([*"abcd" * 5], names * 10)) for _ in range(episodes)]
    counts = [raw - number % 2 for number in range(episodes)]
    batch = method.arrange(rows, random_pictures("abcd", method.backbone), raw=counts)
    assert isinstance(batch.shown, Demonstrations)
    return AimBatch(batch.packed, batch.pictures, method.reader.read(batch.shown))


def step(method: Aim, optimizer: torch.optim.Optimizer, batch: AimBatch) -> None:
    method(batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def told(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train(name: str) -> None:
    """Train in this process; prints predicted and measured bytes."""
    torch.set_num_threads(1)
    warm = Aim(tiny_backbone(), AimConfig())
    step(warm, torch.optim.AdamW(warm.aggregator.parameters()), make_batch(warm, 2, 1))
    before = told("VmRSS")
    episodes, raw = SIZES[name]
    backbone = load_backbone(resolve("embedded:nano")) if name == "nano" else shaped_like_smol()
    method = build_method(backbone, AimConfig())
    assert isinstance(method, Aim)
    batch = make_batch(method, episodes, raw)
    # The peak so far is forgotten: loading is none of what is predicted.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    optimizer = torch.optim.AdamW(method.trainable().values())
    for _ in range(STEPS):
        step(method, optimizer, batch)
    measured = told("VmHWM") - before
    settings = TrainConfig(micro_batch=episodes, global_batch=episodes, num_workers=1)
    alone = Hardware("one process", 1, "cpu", 2**40, None)
    tokens, scored = batch.packed.ids_BL.shape[1], batch.num_scored // episodes
    working = activations(method, settings, alone, PromptShape(tokens, scored))
    states = spread(method, settings, alone, 0, optimizer=False, parameters=False)
    predicted = states.held + max(working.total, states.step)
    print(json.dumps({"tokens": tokens, "predicted": predicted, "measured": measured}))


def run(name: str, variables: Mapping[str, str]) -> dict[str, int]:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, name]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.bench
@pytest.mark.parametrize("name", SIZES)
def test_planned_memory_is_what_a_process_takes(name: str, figures: Figures) -> None:
    found, kept = run(name, GIVE_BACK), run(name, {})
    error = found["predicted"] / found["measured"] - 1
    figures.absolute("tokens of an episode", found["tokens"], "tokens")
    figures.absolute("predicted", found["predicted"] / 2**20, "MiB")
    figures.absolute("measured", found["measured"] / 2**20, "MiB")
    figures.absolute("measured as glibc keeps it", kept["measured"] / 2**20, "MiB")
    figures.ratio("predicted over measured", found["predicted"] / found["measured"])
    assert abs(error) <= MOST

"""The model and the adapter that come along: what they are, and that they do what their cards say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.evaluate import Condition
from mmicl_core.data.images import decode
from mmicl_core.data.pictures import VISUAL, PreparedPicture
from mmicl_core.evaluation.metrics import names_exactly, names_only
from mmicl_core.evaluation.naming import NamingTask
from mmicl_core.methods import load_method
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.base import Method, Plain
from tests.corpora import Opened, drawn_episodes, open_shards
from tests.fakes import episode_row

NANO, AIM, CORPUS = (resolve(f"embedded:{name}") for name in ("nano", "nano_aim", "open_emoji"))
LARGEST_MODEL_BYTES = 32_000_000
LARGEST_ADAPTER_BYTES = 600_000
LARGEST_MODEL_PARAMETERS = 15_000_000
EPISODES = 40
MANY = 160
STOCK_ONLY = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name it:"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
picture = Image.new("RGB", (72, 72), "red")
inputs = processor(images=[picture], text=text, return_tensors="pt", add_special_tokens=False)
ids = model.float().generate(**inputs, max_new_tokens=8)
print(ids.shape[1] - inputs["input_ids"].shape[1])
assert not [name for name in sys.modules if name.partition(".")[0] in ("mmicl_core", "pipelines")]
"""


@pytest.fixture(scope="module")
def nano() -> HuggingFaceBackbone:
    return load_backbone(NANO)


@pytest.fixture(scope="module")
def aim(nano: HuggingFaceBackbone) -> Method:
    return load_method(AIM, nano)


def test_nano_is_small_16_bit_and_reads_enough_visual_tokens(nano):
    assert sum(parameter.numel() for parameter in nano.parameters()) <= LARGEST_MODEL_PARAMETERS
    assert sum(file.stat().st_size for file in NANO.rglob("*")) <= LARGEST_MODEL_BYTES
    (prepared,) = nano.prepare([Image.new("RGB", (72, 72), "red")])
    assert sum(token == VISUAL for token in prepared.ids) >= 25
    for file in NANO.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118


def test_nano_is_loaded_and_generates_with_nothing_of_ours_imported(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", STOCK_ONLY, str(NANO)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 0, "it said nothing"


def test_adapter_is_of_a_few_hundred_kilobytes_and_fits_nano(aim, nano):
    assert sum(file.stat().st_size for file in AIM.rglob("*")) <= LARGEST_ADAPTER_BYTES
    assert isinstance(aim, Aim)
    assert aim.aggregator(torch.zeros(2, nano.width)).shape == (2, nano.width)


@pytest.mark.parametrize("folder", [NANO, AIM], ids=["nano", "nano_aim"])
def test_training_log_ends_at_the_last_step_with_a_lower_loss(folder):
    logs = sorted((folder / "training").glob("*.jsonl"))
    assert logs
    for log in logs:
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps))
        assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("folder", [NANO, AIM], ids=["nano", "nano_aim"])
def test_model_card_tells_the_accuracies_of_the_committed_evaluation(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    rows = json.loads((folder / "training" / "evaluation.json").read_text(encoding="utf-8"))
    for row in rows:
        assert row["queries"] >= 1000
        scores = [f"{row['conditions'][name]['accuracy']:.3f}" for name in row["conditions"]]
        line = rf"\| {row['part']} \| {row['shots_per_class']} \|.*"
        (told,) = re.findall(line, card)
        assert set(scores) <= set(told.split())


def test_model_card_tells_what_the_methods_around_nano_reached():
    card = (NANO / "README.md").read_text(encoding="utf-8")
    for row in json.loads((NANO / "training" / "methods.json").read_text(encoding="utf-8")):
        for name, score in row["conditions"].items():
            told = f"{score['accuracy']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
            about = f"| `{row['recipe']}` | {row['method']} | {row['trained']:,} | {row['queries']:,} |"
            assert f"{about} {name} | {told} |" in card


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Opened:
    return open_shards(CORPUS, tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="module")
def episodes(corpus) -> list[dict[str, Any]]:
    """Held-out episodes of 4 shots of each class, as the evaluation draws them."""
    config = EpisodeConfig(
        part="held_out_concepts",
        stages=(ShotStage(episodes=EPISODES, min_shots_of_both_classes=8, max_shots_of_both_classes=8),),
        seed=1,
    )
    return drawn_episodes(corpus, config)


def see(
    nano: HuggingFaceBackbone, corpus: Opened, rows: Sequence[Mapping[str, Any]]
) -> Mapping[str, PreparedPicture]:
    """Every picture of the episodes `rows`, as nano takes it."""
    keys = sorted({turn["picture"] for row in rows for turn in row["turns"]})
    prepared = nano.prepare([decode(corpus.encoded[key]) for key in keys])
    return dict(zip(keys, prepared, strict=True))


@pytest.mark.parametrize(
    ("condition", "low", "high"),
    [
        ("full", 0.7, 1.0),
        ("adapted", 0.6, 1.0),
        ("mixed", 0.6, 1.0),
        ("swapped", 0.0, 0.3),
        ("adapted_swapped", 0.0, 0.4),
        ("zero_shot", 0.0, 0.0),
        ("adapted_zero_shot", 0.0, 0.0),
    ],
)
def test_nano_learns_names_from_demonstrations_and_follows_them(
    nano, aim, corpus, episodes, condition: Condition, low, high
):
    task = NamingTask(Plain(nano), aim, max_new_tokens=12)
    answers = task.answer(episodes, condition, see(nano, corpus, episodes))
    right = [
        names_only(said, row["answer"], row["other"]) for said, row in zip(answers, episodes, strict=True)
    ]
    assert len(right) == EPISODES
    assert low <= sum(right) / len(right) <= high


def test_demonstration_written_out_behind_fused_ones_costs_no_more_than_five_points(nano, aim, corpus):
    config = EpisodeConfig(
        part="held_out_concepts",
        stages=(ShotStage(episodes=MANY, min_shots_of_both_classes=8, max_shots_of_both_classes=8),),
        seed=1,
    )
    rows = drawn_episodes(corpus, config)
    task, pictures = NamingTask(Plain(nano), aim, max_new_tokens=8), see(nano, corpus, rows)
    right = {
        condition: sum(
            names_only(said, row["answer"], row["other"])
            for said, row in zip(task.answer(rows, condition, pictures), rows, strict=True)
        )
        for condition in ("adapted", "mixed")
    }
    assert right["mixed"] >= right["adapted"] - 0.05 * MANY


def test_nano_says_the_true_names_of_most_pictures_that_it_was_trained_on(nano, corpus):
    split, pairs = corpus.split, [row.pair for row in corpus.rows]
    known = [
        pair
        for pair in pairs
        if not split.holds_out(pair["concept"]) and pair["style"] != split.held_out_style
    ]
    asked = known[:: len(known) // EPISODES][:EPISODES]
    rows = [episode_row([pair["picture"]], [pair["name"]]) for pair in asked]
    task = NamingTask(Plain(nano), None, max_new_tokens=12)
    answers = task.answer(rows, "true_name", see(nano, corpus, rows))
    right = [names_exactly(said, pair["name"]) for said, pair in zip(answers, asked, strict=True)]
    assert sum(right) / EPISODES > 0.6

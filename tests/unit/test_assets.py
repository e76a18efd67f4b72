"""The model and the adapter that come along: what they are, and that they do what their cards say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.data.pictures import VISUAL
from mmicl_core.evaluation.answering import LocalAnswerer, request_of
from mmicl_core.evaluation.cells import lay_out
from mmicl_core.evaluation.tasks.corpus import TrueNameTask, TwoWayTask
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
    weights = (file for file in AIM.rglob("*") if not file.name.startswith("card."))
    assert sum(file.stat().st_size for file in weights) <= LARGEST_ADAPTER_BYTES
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
def test_model_card_tells_the_scores_of_the_in_context_card(folder):
    told = (folder / "README.md").read_text(encoding="utf-8")
    card = json.loads((AIM / "card.json").read_text(encoding="utf-8"))
    assert card["verdict"]["learns"] is True
    naming = [task for task in card["tasks"] if task["task"] == "two_way"]
    assert len(naming) == 2
    for task in naming:
        assert task["queries"] > 950
        full, adapted = ({point["shots"]: point for point in curve["points"]} for curve in task["curves"])
        part = task["label"].removeprefix("two_way ")
        for shots, point in full.items():
            scores = f"{_score(point)} | {_score(adapted[shots])} |"
            assert f"| {part} | {task['queries']:,} | {shots} | {scores}" in told
        swapped = " | ".join(_score(control) for control in task["controls"])
        assert f"| {part}, names swapped | {task['controls'][0]['queries']:,} | 16 | {swapped} |" in told


def _score(point):
    return f"{point['value']:.3f} ({point['low']:.3f} to {point['high']:.3f})"


def test_model_card_tells_how_often_nano_says_true_names():
    told = (NANO / "README.md").read_text(encoding="utf-8")
    card = json.loads((AIM / "card.json").read_text(encoding="utf-8"))
    for task in card["tasks"]:
        if task["task"] == "true_name":
            (point,) = task["curves"][0]["points"]
            part = task["label"].removeprefix("true_name ")
            assert f"| {part} | {task['queries']:,} | {_score(point)} |" in told


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


@dataclass(frozen=True)
class Encoded:
    """Pictures in memory."""

    pictures: Mapping[str, bytes]

    def read(self, key: str) -> bytes:
        return self.pictures[key]


def naming(corpus: Opened, queries: int) -> TwoWayTask:
    """Questions about held-out concepts, as the evaluation draws them."""
    config = EpisodeConfig(
        part="held_out_concepts",
        stages=(ShotStage(episodes=queries, min_shots_of_both_classes=8, max_shots_of_both_classes=8),),
        seed=1,
    )
    return TwoWayTask(drawn_episodes(corpus, config), Encoded(corpus.encoded))


def accuracy(task: TwoWayTask, method: Method, shots: int, control: Any = None, raw: int = 0) -> float:
    """Of a method's answers to all questions of a task."""
    controls = () if control is None else (control,)
    layout = lay_out(task, EvaluateConfig(shots=(shots,), controls=controls, queries=MANY))
    (cell,) = (cell for cell in layout.cells if cell.control == control)
    requests = [request_of(task, shown, "chat") for shown in cell.shown]
    replies = LocalAnswerer(method, raw).answer(requests, layout.questions.pictures)
    scores = [
        task.score(shown.query, reply.prediction) for shown, reply in zip(cell.shown, replies, strict=True)
    ]
    return sum(score["right"] for score in scores) / len(scores)


@pytest.fixture(scope="module")
def questions(corpus) -> TwoWayTask:
    return naming(corpus, EPISODES)


@pytest.mark.parametrize(
    ("adapted", "shots", "control", "low", "high"),
    [
        (False, 8, None, 0.7, 1.0),
        (True, 8, None, 0.6, 1.0),
        (False, 8, "swapped", 0.0, 0.3),
        (True, 8, "swapped", 0.0, 0.4),
        (False, 0, None, 0.0, 0.0),
        (True, 0, None, 0.0, 0.0),
        (False, 8, "query_rule", 0.7, 1.0),
        (True, 8, "query_rule", 0.6, 1.0),
    ],
)
def test_nano_learns_names_from_demonstrations_and_follows_them(
    nano, aim, questions, adapted, shots, control, low, high
):
    assert low <= accuracy(questions, aim if adapted else Plain(nano), shots, control) <= high


def test_demonstration_written_out_behind_fused_ones_costs_no_more_than_five_points(aim, corpus):
    many = naming(corpus, MANY)
    assert accuracy(many, aim, 8, raw=1) >= accuracy(many, aim, 8) - 0.05


def test_nano_says_the_true_names_of_most_pictures_that_it_was_trained_on(nano, corpus):
    split, pairs = corpus.split, [row.pair for row in corpus.rows]
    known = [
        pair
        for pair in pairs
        if not split.holds_out(pair["concept"]) and pair["style"] != split.held_out_style
    ]
    asked = known[:: len(known) // EPISODES][:EPISODES]
    rows = [{"id": pair["picture"], **episode_row([pair["picture"]], [pair["name"]])} for pair in asked]
    for row, pair in zip(rows, asked, strict=True):
        row["turns"][-1]["concept"] = pair["concept"]
    names = {pair["concept"]: pair["name"] for pair in asked}
    task = TrueNameTask(rows, Encoded(corpus.encoded), names)
    layout = lay_out(task, EvaluateConfig(shots=(0,), controls=()))
    (cell,) = layout.cells
    requests = [request_of(task, shown, "chat") for shown in cell.shown]
    replies = LocalAnswerer(Plain(nano)).answer(requests, layout.questions.pictures)
    right = [
        task.score(shown.query, reply.prediction)["right"]
        for shown, reply in zip(cell.shown, replies, strict=True)
    ]
    assert sum(right) / EPISODES > 0.6

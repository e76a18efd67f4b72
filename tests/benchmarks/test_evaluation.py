"""How much faster questions are answered in batches than one at a time, by nano on one CPU thread.

    make bench

Prints one JSON object for each number of demonstrations: questions a second in batches over one at a time.
The answers have to be the same.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import load_for_inference
from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.evaluation.answering import LocalAnswerer, request_of
from mmicl_core.evaluation.cells import lay_out
from mmicl_core.evaluation.tasks.corpus import TwoWayTask
from mmicl_core.methods.base import Plain
from tests.corpora import drawn_episodes, open_shards
from tests.unit.test_assets import Encoded

QUERIES, BATCH, SHOTS = 64, 32, 8


@pytest.mark.bench
@pytest.mark.parametrize("shots", [0, SHOTS])
def test_batches_are_answered_faster_than_questions_one_at_a_time(shots: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    corpus = open_shards(resolve("embedded:open_emoji"), tmp_path)
    stage = ShotStage(episodes=QUERIES, min_shots_of_both_classes=SHOTS, max_shots_of_both_classes=SHOTS)
    rows = drawn_episodes(corpus, EpisodeConfig(part="held_out_concepts", stages=(stage,), seed=1))
    task = TwoWayTask(rows, Encoded(corpus.encoded))
    layout = lay_out(task, EvaluateConfig(shots=(shots,), controls=(), queries=QUERIES))
    requests = [request_of(task, shown, "chat") for shown in layout.cells[0].shown]
    answerer, pictures = (
        LocalAnswerer(Plain(load_for_inference(resolve("embedded:nano")))),
        Encoded(corpus.encoded),
    )
    answerer.answer(requests[:1], pictures)

    def answered(size: int) -> tuple[list[str], float]:
        begun, texts = time.perf_counter(), list[str]()
        for start in range(0, len(requests), size):
            texts += [reply.text for reply in answerer.answer(requests[start : start + size], pictures)]
        return texts, time.perf_counter() - begun

    (alone, seconds_alone), (together, seconds_together) = answered(1), answered(BATCH)
    assert together == alone
    ratio = seconds_alone / seconds_together
    print(json.dumps({"shots": shots, "questions a second, batches over one at a time": round(ratio, 2)}))
    assert ratio > 1

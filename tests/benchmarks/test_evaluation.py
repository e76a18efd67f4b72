"""How much faster questions are answered in batches than one at a time, by nano on one CPU thread.

    make bench

Records for names (a token or two) and for descriptions (tens of tokens), with and without demonstrations,
questions a second in batches over one at a time. The answers have to be the same.

What a batch saves is the overhead of a pass, and the arithmetic units that a single row leaves idle. Names
behind long prompts leave none: there almost all of the time is that of reading pictures and prompts, which is
arithmetic in either case. The bar is that of generation, descriptions without demonstrations.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import load_for_inference
from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.evaluation.answering import LocalAnswerer, Request, request_of
from mmicl_core.evaluation.cells import lay_out
from mmicl_core.evaluation.tasks.corpus import TwoWayTask
from mmicl_core.methods.base import Plain
from tests.benchmarks.records import Figures
from tests.corpora import drawn_episodes, open_shards
from tests.unit.test_assets import Encoded

QUERIES, BATCH, SHOTS = 64, 32, 8
DESCRIPTION = "Describe the picture.", 64


@pytest.mark.bench
@pytest.mark.parametrize(
    ("described", "shots", "least"),
    [(True, 0, 4), (True, SHOTS, 0), (False, 0, 0), (False, SHOTS, 0)],
    ids=["descriptions", "descriptions with demonstrations", "names", "names with demonstrations"],
)
def test_batches_are_answered_faster_than_questions_one_at_a_time(
    described: bool, shots: int, least: float, tmp_path: Path, figures: Figures
) -> None:
    torch.set_num_threads(1)
    corpus = open_shards(resolve("embedded:open_emoji"), tmp_path)
    stage = ShotStage(episodes=QUERIES, min_shots_of_both_classes=SHOTS, max_shots_of_both_classes=SHOTS)
    rows = drawn_episodes(corpus, EpisodeConfig(part="held_out_concepts", stages=(stage,), seed=1))
    task = TwoWayTask(rows, Encoded(corpus.encoded))
    layout = lay_out(task, EvaluateConfig(shots=(shots,), controls=(), queries=QUERIES))
    requests = [request_of(task, shown, "chat") for shown in layout.cells[0].shown]
    if described:
        requests = [_describing(request) for request in requests]
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
    figures.absolute("letters of an answer", sum(map(len, alone)) / len(alone), "letters")
    figures.ratio("questions a second, batches over one at a time", ratio)
    assert ratio > least


def _describing(request: Request) -> Request:
    *shown, query = request.turns
    words, most = DESCRIPTION
    return Request((*shown, replace(query, question=words)), most)

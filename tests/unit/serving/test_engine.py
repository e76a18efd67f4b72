"""Every family and method: what the engine answers among others is what each question is answered alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from mmicl_core.backbones.decoding import Decoding
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.errors import DataError
from mmicl_core.methods.base import Plain
from mmicl_core.prompts import Turn
from mmicl_core.serving.engine import Engine
from mmicl_core.serving.jobs import Job, OutOfTimeError
from mmicl_core.serving.sampling import Sampling
from tests.fakes import tiny_backbone
from tests.families import NAMES, write_model
from tests.methods import make_method
from tests.unit.serving.asking import MEGABYTE, MOST, Told, alone, job, pictures, question, run

METHODS = ("aim", "m2pt", "mmict", "mtv", "prompt_tuning")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")

    @cache
    def folder(name: str) -> HuggingFaceBackbone:
        write_model(name, root / name)
        return load_backbone(root / name).eval()

    return folder


# Every family with demonstrations written out, every method around two of them.
CASES = [*((name, "plain") for name in NAMES), *product(("llava", "qwen3_vl"), METHODS)]


@pytest.mark.parametrize(("family", "method_name"), CASES)
def test_answers_among_others_are_those_given_alone(models: Any, family: str, method_name: str) -> None:
    backbone = models(family)
    method = Plain(backbone) if method_name == "plain" else make_method(method_name, backbone)
    asked = [(seed, shots) for seed in range(3) for shots in (2, 0, 1)]
    expected = [alone(method, *one) for one in asked]
    engine, told = Engine(backbone, 4, MEGABYTE), [Told() for _ in asked]
    # The second round finds the prefixes of the first; some come while others grow.
    for places in (range(5), range(5, 9), range(9)):
        for place in places:
            told[place] = Told()
            seed, shots = asked[place]
            engine.add(job(method, seed, shots, told[place], prefix=f"{seed}/{shots}"))
        engine.step()
    run(engine)
    assert [one.tokens[0] for one in told] == expected
    assert all(len(one.begun) == 1 and one.ended[0].error is None for one in told)


@pytest.fixture(scope="module")
def backbone() -> HuggingFaceBackbone:
    return tiny_backbone().eval()


def test_prefix_is_read_once_and_said_to_be_kept(backbone: HuggingFaceBackbone) -> None:
    engine, method = Engine(backbone, 4, MEGABYTE), Plain(backbone)
    cached = list[int]()
    for _ in range(3):
        told = Told()
        engine.add(job(method, 1, 2, told, prefix="demonstrations"))
        run(engine)
        (begun,) = told.begun
        cached.append(begun.cached_tokens)
        assert begun.prompt_tokens > 50
    assert cached[0] == 0 and cached[1] == cached[2] > 50
    assert engine.prefixes.nbytes == _bytes_of(backbone, cached[1])


def _bytes_of(backbone: HuggingFaceBackbone, tokens: int) -> int:
    config = backbone.text_config
    size = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * tokens * 4


def test_prefixes_not_used_for_longest_go_when_memory_is_spent(backbone: HuggingFaceBackbone) -> None:
    method = Plain(backbone)
    engine = Engine(backbone, 4, _bytes_of(backbone, 200))
    for name, seed in (("a", 1), ("b", 2), ("a", 1), ("c", 3)):
        engine.add(job(method, seed, 2, Told(), prefix=name))
        run(engine)
    assert "a" in engine.prefixes and "c" in engine.prefixes and "b" not in engine.prefixes


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_drawn_answers_depend_on_their_seed_and_not_on_who_is_answered_beside(
    backbone: HuggingFaceBackbone, temperature: float
) -> None:
    method = Plain(backbone)
    samplings = tuple(Sampling(MOST, temperature=temperature, top_p=0.9, seed=seed) for seed in range(4))
    together = Told()
    engine = Engine(backbone, 9, 0)
    engine.add(job(method, 5, 1, Told()))
    engine.step()
    engine.add(job(method, 1, 2, together, samplings=samplings))
    engine.add(job(method, 4, 0, Told()))
    run(engine)
    assert len({tuple(tokens) for tokens in together.tokens.values()}) > 1
    for index, sampling in enumerate(samplings):
        single = Told()
        engine.add(job(method, 1, 2, single, samplings=(sampling,)))
        run(engine)
        assert single.tokens[0] == together.tokens[index]


@contextmanager
def ending_with(tokenizer: Any, token: int) -> Iterator[None]:
    """Take another token for the end of an answer; a tokenizer is no object that can be patched."""
    before, tokenizer.eos_token_id = tokenizer.eos_token_id, token
    try:
        yield
    finally:
        tokenizer.eos_token_id = before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_that_ignores_the_end_has_all_its_tokens_and_those_beside_it_end_as_they_would(
    backbone: HuggingFaceBackbone, temperature: float
) -> None:
    method, single = Plain(backbone), Told()
    engine = Engine(backbone, 4, 0)
    engine.add(job(method, 2, 1, single, samplings=(Sampling(3 * MOST, temperature=temperature, seed=7),)))
    run(engine)
    # Now the model ends where it said its third token.
    end = single.tokens[0][2]
    told, samplings = Told(), [Sampling(3 * MOST, temperature=temperature, seed=7) for _ in range(2)]
    samplings[0] = replace(samplings[0], ignore_eos=True)
    engine.add(job(method, 2, 1, told, samplings=tuple(samplings)))
    with ending_with(backbone.tokenizer, end):
        run(engine)
    assert (len(told.tokens[0]), told.ended[0].reason) == (3 * MOST, "length")
    assert end not in told.tokens[0]
    assert (told.tokens[1], told.ended[1].reason) == (single.tokens[0][: single.tokens[0].index(end)], "stop")


def test_likelihoods_are_those_of_the_scores_of_each_token(backbone: HuggingFaceBackbone) -> None:
    told = Told()
    engine = Engine(backbone, 4, 0)
    engine.add(job(Plain(backbone), 1, 1, told, samplings=(Sampling(MOST, top_logprobs=3),)))
    run(engine)
    for token, likelihood in zip(told.tokens[0], told.likelihoods, strict=True):
        assert likelihood.token == token == likelihood.likeliest[0][0]
        assert likelihood.logprob == pytest.approx(likelihood.likeliest[0][1])
        assert len(likelihood.likeliest) == 3
        assert [value for _, value in likelihood.likeliest] == sorted(
            (value for _, value in likelihood.likeliest), reverse=True
        )


def test_job_that_is_cancelled_is_never_heard_of_again_and_frees_its_row(
    backbone: HuggingFaceBackbone,
) -> None:
    method, cancelled, other, waiting = Plain(backbone), Told(), Told(), Told()
    engine = Engine(backbone, 2, 0)
    jobs = [job(method, seed, 1, told) for seed, told in enumerate((cancelled, other, waiting))]
    for one in jobs:
        engine.add(one)
    engine.step()
    jobs[0].cancelled = True
    heard = len(cancelled.tokens[0])
    engine.step()
    assert engine.running == 2 and engine.waiting == 0
    run(engine)
    assert len(cancelled.tokens[0]) == heard and not cancelled.ended
    assert other.tokens[0] == alone(method, 1, 1)
    assert waiting.tokens[0] == alone(method, 2, 1)


def test_job_whose_time_is_up_is_told_whether_it_waits_or_runs(backbone: HuggingFaceBackbone) -> None:
    method, running, waiting, other = Plain(backbone), Told(), Told(), Told()
    engine = Engine(backbone, 1, 0)
    soon = time.monotonic() + 0.2
    engine.add(job(method, 0, 1, running, deadline=soon))
    engine.add(job(method, 1, 1, waiting, deadline=soon))
    engine.add(job(method, 2, 1, other))
    engine.step()
    time.sleep(0.25)
    run(engine)
    for told in (running, waiting):
        assert isinstance(told.ended[0].error, OutOfTimeError)
    assert running.tokens[0] and not waiting.tokens[0]
    assert other.tokens[0] == alone(method, 2, 1)


def test_answer_that_is_stopped_from_outside_ends_without_another_token(
    backbone: HuggingFaceBackbone,
) -> None:
    method, told = Plain(backbone), Told()
    engine = Engine(backbone, 4, 0)
    asked = job(method, 0, 1, told, samplings=(Sampling(MOST), Sampling(MOST)))
    engine.add(asked)
    engine.step()
    asked.stopped.add(1)
    run(engine)
    assert len(told.tokens[1]) < len(told.tokens[0]) == MOST
    assert 1 not in told.ended


def test_step_that_fails_is_told_to_all_in_its_batch_and_to_nobody_else(
    backbone: HuggingFaceBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, first, second, later = Plain(backbone), Told(), Told(), Told()
    engine = Engine(backbone, 4, 0)
    feed, failing = Decoding.feed, True

    def fail(decoding: Decoding, ids_B: torch.Tensor) -> None:
        if failing:
            raise RuntimeError("out of memory")
        feed(decoding, ids_B)

    monkeypatch.setattr(Decoding, "feed", fail)
    engine.add(job(method, 0, 1, first))
    engine.add(job(method, 1, 1, second, samplings=(Sampling(MOST), Sampling(MOST))))
    engine.step()
    engine.step()
    assert engine.idle
    failing = False
    engine.add(job(method, 2, 1, later))
    run(engine)
    assert [str(told.ended[0].error) for told in (first, second)] == ["out of memory"] * 2
    assert later.tokens[0] == alone(method, 2, 1)


def test_answer_whose_scores_are_no_numbers_fails_alone(backbone: HuggingFaceBackbone) -> None:
    method, broken, other = Plain(backbone), Told(), Told()
    engine = Engine(backbone, 4, 0)
    nothing = torch.full((3, backbone.width), float("nan"))
    engine.add(job(method, 0, 1, broken, fused=(nothing,)))
    engine.add(job(method, 1, 1, other))
    run(engine)
    assert isinstance(broken.ended[0].error, ArithmeticError) and not broken.tokens[0]
    assert other.tokens[0] == alone(method, 1, 1)


def test_questions_that_are_read_in_one_step_are_few_enough_for_those_that_grow(
    backbone: HuggingFaceBackbone,
) -> None:
    method = Plain(backbone)
    length = method.arrange([question(0, 2)], pictures(backbone)).packed.mask_BL.shape[1]
    told = [Told() for _ in range(5)]
    engine = Engine(backbone, 9, MEGABYTE, prefill_tokens=2 * length)
    for place, one in enumerate(told):
        # What is read first and kept counts too.
        engine.add(job(method, 0, 2, one, prefix="kept" if place == 4 else None))
    begun = list[int]()
    for _ in range(3):
        engine.step()
        begun.append(sum(bool(one.begun) for one in told))
    assert begun == [2, 4, 5]
    run(engine)
    assert [one.tokens[0] for one in told] == [alone(method, 0, 2)] * 5


def test_job_that_cannot_be_read_fails_alone(backbone: HuggingFaceBackbone) -> None:
    method, broken, other = Plain(backbone), Told(), Told()
    engine = Engine(backbone, 4, 0)
    engine.add(Job(method, (Turn(("c",), "<image>", None),), pictures(backbone), (Sampling(MOST),), broken))
    engine.add(job(method, 1, 1, other))
    engine.add(job(method, 1, 1, Told(), samplings=(Sampling(5000),)))
    run(engine)
    assert isinstance(broken.ended[0].error, DataError)
    assert "control token" in str(broken.ended[0].error)
    assert other.tokens[0] == alone(method, 1, 1)


def test_prompt_that_does_not_fit_is_refused_with_both_lengths(backbone: HuggingFaceBackbone) -> None:
    told = Told()
    engine = Engine(backbone, 4, 0)
    engine.add(job(Plain(backbone), 1, 1, told, samplings=(Sampling(2040),)))
    run(engine)
    error = told.ended[0].error
    assert isinstance(error, DataError)
    assert "the answer may take 2040, the model reads 2048" in str(error)


def test_more_answers_than_rows_begin_where_nothing_else_runs(backbone: HuggingFaceBackbone) -> None:
    method, first, many = Plain(backbone), Told(), Told()
    engine = Engine(backbone, 2, 0)
    engine.add(job(method, 0, 1, first))
    engine.add(job(method, 1, 1, many, samplings=(Sampling(MOST),) * 3))
    engine.step()
    assert engine.running == 1 and not many.begun
    run(engine)
    assert [many.tokens[index] for index in range(3)] == [alone(method, 1, 1)] * 3

"""What is known before a question is not read again, and makes no difference to the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.errors import DataError
from mmicl_core.methods.base import Method, Plain
from mmicl_core.prompts import Turn
from mmicl_core.serving.engine import Engine
from mmicl_core.serving.jobs import Job
from tests.fakes import tiny_backbone
from tests.families import write_model
from tests.methods import make_method
from tests.unit.serving.asking import MEGABYTE, Told, alone, job, pictures, question, run

SYSTEM = "{% if messages[0]['role'] == 'system' %}[{{ messages[0]['content'][0]['text'] }}]{% endif %}"
EVERY = "{% for message in messages %}"
EVERY_OTHER = "{% for message in messages if message['role'] != 'system' %}"


@pytest.fixture(scope="module")
def backbone() -> HuggingFaceBackbone:
    return tiny_backbone().eval()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Of every pass over prompts: rows, columns, and whether soft tokens stood before them."""
    passes = list[tuple[int, int, bool]]()
    original = HuggingFaceBackbone.read

    def watched(self: HuggingFaceBackbone, prompts: Embedded, **more: Any) -> Any:
        passes.append((*prompts.mask_BL.shape, prompts.soft_BL is not None))
        return original(self, prompts, **more)

    monkeypatch.setattr(HuggingFaceBackbone, "read", watched)
    return passes


def ask(engine: Engine, *jobs: Callable[[Told], Job]) -> list[Told]:
    told = [Told() for _ in jobs]
    for make, one in zip(jobs, told, strict=True):
        engine.add(make(one))
    run(engine)
    assert not [ended.error for one in told for ended in one.ended.values() if ended.error]
    return told


def test_of_a_question_behind_a_known_prefix_the_last_turn_alone_is_written_seen_and_read(
    backbone: HuggingFaceBackbone, read: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, method = Engine(backbone, 4, MEGABYTE), Plain(backbone)
    (first,) = ask(engine, lambda told: job(method, 1, 2, told, prefix="p"))
    written, seen = list[Turn](), list[int]()
    write_turn, see = method.write_turn, method.see
    monkeypatch.setattr(method, "write_turn", lambda turn: (written.append(turn), write_turn(turn))[1])
    monkeypatch.setattr(method, "see", lambda batch: (seen.append(len(batch)), see(batch))[1])
    last = {"c": pictures(backbone)["c"]}
    read.clear()
    (second,) = ask(engine, lambda told: job(method, 1, 2, told, prefix="p", pictures=last))
    assert second.tokens == first.tokens
    assert written == [question(1, 2)[-1]] and seen == [1]
    ((rows, columns, _),) = read
    assert rows == 1
    assert columns == second.begun[0].prompt_tokens - second.begun[0].cached_tokens < 50
    assert second.begun[0].demo_tokens == first.begun[0].demo_tokens == second.begun[0].cached_tokens - 1


def test_prefix_that_a_job_holds_serves_it_also_when_it_is_kept_no_longer(
    backbone: HuggingFaceBackbone,
) -> None:
    engine, method = Engine(backbone, 4, MEGABYTE), Plain(backbone)
    (first,) = ask(engine, lambda told: job(method, 1, 2, told, prefix="p"))
    known = engine.prefixes.get("p")
    other = Engine(backbone, 4, 0)
    last = {"c": pictures(backbone)["c"]}
    (second,) = ask(other, lambda told: job(method, 1, 2, told, prefix="p", known=known, pictures=last))
    assert second.tokens == first.tokens and "p" not in other.prefixes


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_questions_behind_prefixes_of_other_lengths_and_behind_none_are_answered_as_alone(
    family: str, tmp_path: Path, read: list[Any]
) -> None:
    write_model(family, tmp_path)
    backbone = load_backbone(tmp_path).eval()
    engine, method = Engine(backbone, 9, MEGABYTE), Plain(backbone)
    asked = [(1, 2), (2, 0), (2, 1), (0, 3), (3, 2)]
    expected = [alone(method, *one) for one in asked]
    jobs = [
        lambda told, seed=seed, shots=shots: job(
            method, seed, shots, told, prefix=f"{seed}/{shots}" if shots and seed < 3 else None
        )
        for seed, shots in asked
    ]
    assert [told.tokens[0] for told in ask(engine, *jobs)] == expected
    read.clear()
    assert [told.tokens[0] for told in ask(engine, *jobs)] == expected
    # Where layers look at the last columns only, nothing may be padded.
    assert len(read) == 1 or family == "gemma3"


@pytest.mark.parametrize("name", ["m2pt", "prompt_tuning"])
def test_soft_tokens_before_all_prompts_are_read_once_for_all_questions(
    name: str, backbone: HuggingFaceBackbone, read: list[tuple[int, int, bool]]
) -> None:
    method = make_method(name, backbone)
    expected = [alone(method, seed, seed % 3) for seed in range(5)]
    engine = Engine(backbone, 9, MEGABYTE)
    read.clear()
    jobs = [
        lambda told, seed=seed: job(method, seed, seed % 3, told, prefix=f"{seed}" if seed % 3 else None)
        for seed in range(5)
    ]
    for _ in range(2):
        assert [told.tokens[0] for told in ask(engine, *jobs)] == expected
    assert sum(has_soft_tokens for *_, has_soft_tokens in read) == 1


def test_another_method_never_has_the_soft_tokens_of_one_that_is_gone(
    backbone: HuggingFaceBackbone,
) -> None:
    engine = Engine(backbone, 9, MEGABYTE)
    for seed in range(6):
        method: Method = make_method("prompt_tuning", backbone, seed)
        (told,) = ask(engine, lambda told, method=method: job(method, 1, 1, told))
        assert told.tokens[0] == alone(method, 1, 1)
        del method


def test_system_message_stands_before_everything_and_changes_the_prefix() -> None:
    backbone = tiny_backbone(seed=3).eval()
    plain = backbone.processor.chat_template
    backbone.processor.chat_template = plain.replace(
        "{% for message in messages %}",
        SYSTEM + "{% for message in messages if message['role'] != 'system' %}",
        1,
    )
    try:
        method, engine = Plain(backbone), Engine(backbone, 9, MEGABYTE)
        turns = question(1, 2)
        expected = list[list[int]]()
        for system in ("See well.", "bako" * 9, None):
            pieces = [
                *method.chat.prefix(system),
                *(piece for one in turns for piece in method.write_turn(one)),
            ]
            shown = [(pictures(backbone)[key], one.question) for one in turns for key in one.pictures]
            with torch.no_grad():
                expected.append(method.generate(method.embed(method.pack([pieces], shown, "left")), 6)[0])
        for kept in (True, False, True):
            jobs = [
                lambda told, system=system, kept=kept: job(
                    method, 1, 2, told, system=system, prefix=f"{system}" if kept else None
                )
                for system in ("See well.", "bako" * 9, None)
            ]
            assert [told.tokens[0] for told in ask(engine, *jobs)] == expected
        assert len({tuple(one) for one in expected}) > 1
    finally:
        backbone.processor.chat_template = plain


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"system": "Be brief."}, "take no system message"),
        ({"fused": (torch.zeros(2, 32),)}, "takes no fused ones: send them as turns"),
    ],
)
def test_method_that_writes_prompts_of_its_own_refuses_what_it_has_no_place_for(
    backbone: HuggingFaceBackbone, more: dict[str, Any], reason: str
) -> None:
    told, engine = Told(), Engine(backbone, 4, 0)
    engine.add(job(make_method("mtv", backbone), 1, 1, told, **more))
    run(engine)
    assert isinstance(told.ended[0].error, DataError)
    assert reason in str(told.ended[0].error)


def test_prefix_too_large_to_be_kept_leaves_the_others(backbone: HuggingFaceBackbone) -> None:
    engine, method = Engine(backbone, 4, MEGABYTE), Plain(backbone)
    ask(engine, lambda told: job(method, 1, 1, told, prefix="small"))
    small = engine.prefixes.get("small")
    assert small is not None
    engine.prefixes._most = small.nbytes + 100
    before = engine.prefixes.nbytes
    (told,) = ask(engine, lambda told: job(method, 1, 3, told, prefix="large"))
    assert told.tokens[0] == alone(method, 1, 3)
    assert "small" in engine.prefixes and "large" not in engine.prefixes
    assert engine.prefixes.nbytes == before == small.nbytes
    engine.prefixes.put("again", replace(small))
    assert "small" not in engine.prefixes and engine.prefixes.nbytes == small.nbytes

"""The generator as a plain object: what Ray Serve adds is tested in `integration`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ObjectLostError, OwnerDiedError

from mmicl_core.bank import Bank, Demonstration, Known, OtherMakerError, UnknownPackError
from mmicl_core.errors import BankError, DataError
from mmicl_core.serving.sampling import Sampling
from mmicl_core.serving.transcript import HALF
from pipelines.serve.contracts import Event, Finished, Fusion, PackReference, Piece, Question
from pipelines.serve.errors import (
    DeadlineError,
    OverloadedError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from pipelines.serve.generator import Generator
from tests.fakes import draw_picture, encode_picture
from tests.unit.serve.generating import (
    ADAPTERS,
    by_hand,
    config_of,
    demonstrations,
    finished,
    fuse,
    piece_texts,
    question,
    started,
    text,
    use,
    user_config,
    write_models,
    written_out,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Generator]:
    generator = Generator(folder / "backbone", config_of(folder))
    asyncio.run(generator.reconfigure(user_config(folder, *ADAPTERS)))
    yield generator
    generator.close()


@pytest.fixture
def fresh(folder: Path) -> Iterator[Generator]:
    """Knows no prefix yet."""
    generator = Generator(folder / "backbone", config_of(folder))
    asyncio.run(generator.reconfigure(user_config(folder, "aim")))
    yield generator
    generator.close()


def test_models_are_the_base_model_and_all_adapters(shared: Generator) -> None:
    models = asyncio.run(shared.models())
    assert [one.id for one in models] == ["tiny", *(f"tiny@{name}" for name in ADAPTERS)]
    assert [one.id for one in models if one.fuses] == ["tiny@aim"]


@pytest.mark.parametrize("prefix", [None, "kept"])
def test_answer_is_that_of_the_backbone_behind_fused_and_full_demonstrations(
    folder: Path, shared: Generator, prefix: str | None
) -> None:
    four, one = fuse(folder, 4), fuse(folder, 1)
    asked = (
        (question(), ()),
        (question(**written_out(2, prefix)), ()),
        (question(model="tiny@aim", fusion=four), four.fused),
        (question(model="tiny@aim", fusion=one, **written_out(1, prefix)), one.fused),
        (question(model="tiny@aim", **written_out(3, prefix)), ()),
    )
    expected = [by_hand(folder, one, fused) for one, fused in asked]
    for one, answer in zip(asked, expected, strict=True):
        # Alone, behind what the first one left, and all together.
        assert text(use(shared, one[0])[0]) == answer
        assert text(use(shared, one[0])[0]) == answer
    assert [text(events) for events in use(shared, *(one for one, _ in asked))] == expected
    assert len(set(expected)) > 2


def test_demonstrations_are_counted_as_they_are_and_written_out(folder: Path, fresh: Generator) -> None:
    fusion = fuse(folder, 3)
    alone = started(use(fresh, question())[0])
    full = question(**written_out(3, "three"))
    packed = question(model="tiny@aim", fusion=fusion)
    both = question(model="tiny@aim", fusion=fusion, **written_out(2, "two"))
    assert (alone.demo_tokens, alone.demo_tokens_full, alone.cached_tokens) == (0, 0, 0)
    fused, written, two = sum(fusion.tokens_fused), sum(fusion.tokens_full), sum(fusion.tokens_full[:2])
    for asked, counts in (
        (full, (written, written)),
        (packed, (fused, written)),
        (both, (fused + two, written + two)),
    ):
        first, second = (started(use(fresh, asked)[0]) for _ in range(2))
        for told in (first, second):
            assert (told.demo_tokens, told.demo_tokens_full) == counts
            assert told.prompt_tokens == alone.prompt_tokens + counts[0]
            assert told.queued_ms >= 0 and told.batch == 1
        assert first.cached_tokens == 0
        assert second.cached_tokens == counts[0] + 1


def test_prefix_that_is_known_is_neither_loaded_nor_looked_at_again(folder: Path, fresh: Generator) -> None:
    loads = 0

    async def awaited(arrays: Any) -> Any:
        nonlocal loads
        loads += 1
        return arrays

    fusion, broken = fuse(folder, 2), {"0": b"no picture", "1": b"no picture"}
    asked = question(model="tiny@aim", fusion=fusion, **written_out(2, "two"))
    expected = text(use(fresh, replace(asked, fusion=replace(fusion, fused=awaited(fusion.fused))))[0])
    never = awaited(fusion.fused)
    again = replace(
        asked, fusion=replace(fusion, fused=never), pictures={**broken, "query": asked.pictures["query"]}
    )
    assert text(use(fresh, again)[0]) == expected
    never.close()
    assert loads == 1
    with pytest.raises(DataError, match="picture 1 of 3: the bytes are not a readable picture"):
        use(fresh, replace(again, prefix="other", fusion=fusion))


def mixed_questions(folder: Path) -> list[Question]:
    """Models, packs, seeds, numbers of answers, lengths and pictures, all different."""
    questions = list[Question]()
    for number in range(16):
        model = ["tiny", "tiny@aim", "tiny@prompt_tuning", "tiny@m2pt", "tiny@lora", "tiny@mtv"][number % 6]
        more: dict[str, Any] = written_out(number % 3, f"{number % 3}")
        if model == "tiny@aim":
            more["fusion"] = fuse(folder, 1 + number % 4)
        drawn = Sampling(5 + number % 4, temperature=0.2 * (number % 4), top_p=0.9, seed=number, stop=("ba",))
        samplings = tuple(replace(drawn, seed=number + seed) for seed in range(1 + number % 3))
        about = ("query",) * (number % 2 + 1) if number % 5 else ()
        questions.append(
            question("This is" + "?" * number, model=model, samplings=samplings, about=about, **more)
        )
    return questions


def test_texts_of_questions_at_the_same_time_are_those_of_each_alone(folder: Path, shared: Generator) -> None:
    questions = mixed_questions(folder)
    alone = [use(shared, one)[0] for one in questions]
    together = use(shared, *questions)
    for one, here, there in zip(questions, alone, together, strict=True):
        for index in range(len(one.samplings)):
            assert text(here, index) == text(there, index)
            assert "ba" not in text(here, index)
            ends = (finished(here)[index], finished(there)[index])
            assert len({(end.reason, end.completion_tokens) for end in ends}) == 1
    assert max(started(events).batch for events in together) > 4
    assert len({text(events) for events in together}) > 8


def test_events_come_in_their_order_and_make_up_each_answer(shared: Generator) -> None:
    samplings = (Sampling(8), Sampling(2), Sampling(8, temperature=1.0, seed=5, top_logprobs=2))
    (events,) = use(shared, question(samplings=samplings))
    assert started(events).batch == 3
    for index, sampling in enumerate(samplings):
        own = [
            event for event in events[1:] if not isinstance(event, type(events[0])) and event.index == index
        ]
        assert all(isinstance(event, Piece) for event in own[:-1]) and isinstance(own[-1], Finished)
        assert own[-1].completion_tokens <= sampling.max_new_tokens
        assert own[-1].ttft_ms > 0
    assert (finished(events)[1].reason, finished(events)[1].completion_tokens) == ("length", 2)
    (whole,) = use(shared, question(samplings=samplings[:1]))
    assert text(events, 0) == text(whole)


def test_streamed_pieces_come_while_the_answer_still_grows(shared: Generator) -> None:
    async def groups() -> list[tuple[Event, ...]]:
        return [group async for group in shared.stream(question(most=400))]

    found = asyncio.run(groups())
    assert len(found) > 6
    assert [event for group in found for event in group][1:] and all(found)
    assert "".join(piece_texts([event for group in found for event in group])) == text(
        use(shared, question(most=400))[0]
    )


def test_logprobs_name_the_tokens_of_the_answer(shared: Generator) -> None:
    (events,) = use(shared, question(samplings=(Sampling(8, top_logprobs=3),)))
    told = [one for event in events if isinstance(event, Piece) for one in event.logprobs]
    assert len(told) == finished(events)[0].completion_tokens
    # Bytes that are no characters may be told one by one or as one.
    assert "".join(one.text for one in told).replace(HALF, "") == text(events).replace(HALF, "")
    for one in told:
        assert one.likeliest[0] == (one.text, pytest.approx(one.logprob))
        assert len(one.likeliest) == 3 and one.logprob <= 0
    (events,) = use(shared, question(samplings=(Sampling(4),)))
    assert not any(event.logprobs for event in events if isinstance(event, Piece))


def test_answer_ends_before_a_stop_text_and_takes_no_further_token(shared: Generator) -> None:
    (whole,) = use(shared, question(most=12))
    answer = text(whole)
    stop = answer[3:6]
    (events,) = use(shared, question(samplings=(Sampling(12, stop=(stop,)), Sampling(12))))
    assert text(events, 0) == answer[: answer.index(stop)].rstrip()
    assert text(events, 1) == answer
    assert finished(events)[0].reason == "stop"
    assert finished(events)[0].completion_tokens < finished(events)[1].completion_tokens


@pytest.mark.parametrize(
    ("asked", "kind", "reason"),
    [
        (
            question(most=2048),
            DataError,
            r"the prompt takes \d+ tokens and the answer may take 2048, the model",
        ),
        (question("This is <image>"), DataError, "control token <image>"),
        (question(system="Be brief."), DataError, "takes no system message"),
        (question(system="Be brief.", model="tiny@mtv"), DataError, "takes? no system message"),
        (question(model="other"), UnknownModelError, "model 'other' is not served here"),
        (question(about=("query", "lost")), DataError, "shows 'lost', which is none of its pictures"),
        (
            replace(question(), pictures={"query": encode_picture(draw_picture(0, side=101))}),
            DataError,
            "picture 1 of 1: the picture has 101 x 101 pixels",
        ),
    ],
)
def test_question_that_cannot_be_answered_is_refused_before_the_first_event(
    shared: Generator, asked: Question, kind: type[Exception], reason: str
) -> None:
    async def first() -> None:
        await anext(shared.stream(asked))

    with pytest.raises(kind, match=reason):
        asyncio.run(first())
    assert text(use(shared, question())[0])


def test_fused_demonstrations_before_a_model_that_did_not_make_them_are_refused(
    folder: Path, shared: Generator
) -> None:
    fusion = fuse(folder, 1)
    for model in ("tiny", "tiny@lora"):
        with pytest.raises(RequestError, match=f"model {model} takes no fused demonstrations"):
            use(shared, question(model=model, fusion=fusion))
    narrow = replace(fusion, name="narrow", fused=tuple(one[:, :5] for one in fusion.fused))
    with pytest.raises(DataError, match=r"have the shape \(\d+, 5\), the model's have \(tokens, 32\)"):
        use(shared, question(model="tiny@aim", fusion=narrow))


def test_fused_tokens_that_are_lost_are_told_to_the_ingress_as_ray_tells_it(
    folder: Path, fresh: Generator
) -> None:
    async def lost() -> Any:
        raise OwnerDiedError("object", None, "")

    async def refused() -> Any:
        raise UnknownPackError("no such pack")

    for fused, kind in ((lost(), ObjectLostError), (refused(), BankError)):
        with pytest.raises(kind):
            use(fresh, question(model="tiny@aim", fusion=replace(fuse(folder, 1), fused=fused)))


def test_pack_is_loaded_from_the_bank_for_the_model_that_made_it(folder: Path, fresh: Generator) -> None:
    fusion, maker = fuse(folder, 2), asyncio.run(fresh.models())[1].maker
    assert isinstance(fusion.fused, tuple)
    shown = [Demonstration((picture,), asked, said) for picture, asked, said in demonstrations(2)]
    known = [Known(one, 31) for one in fusion.fused]
    bank = Bank(folder / "bank")
    entry = bank.put_pack("ours", "tiny@aim", maker, shown, known)
    other = bank.put_pack("ours", "tiny@aim", {**maker, "adapter": "another"}, shown, known)
    expected = by_hand(folder, question(), fusion.fused)
    packed = replace(fusion, name="packed", fused=PackReference("ours", entry.id))
    for _ in range(2):
        assert text(use(fresh, question(model="tiny@aim", fusion=packed))[0]) == expected
    for tenant, pack, kind in (("theirs", entry.id, UnknownPackError), ("ours", other.id, OtherMakerError)):
        wrong = replace(fusion, name=f"{tenant}/{pack}", fused=PackReference(tenant, pack))
        with pytest.raises(kind):
            use(fresh, question(model="tiny@aim", fusion=wrong))


def test_answer_that_takes_too_long_ends_with_its_deadline(shared: Generator) -> None:
    with pytest.raises(DeadlineError, match="longer than the 0.05 seconds"):
        use(shared, question(most=1900, seconds=0.05))

    async def never() -> Any:
        await asyncio.Event().wait()

    with pytest.raises(DeadlineError):
        use(shared, question(model="tiny@aim", seconds=0.05, fusion=Fusion("n", (31,), (6,), 0, never())))


def test_stream_that_is_left_frees_its_rows(fresh: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps = fresh._shared.engine, list[int]()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (steps.append(engine.running), step())[1])

    async def until_idle() -> int:
        begun = len(steps)
        while not engine.idle:
            await asyncio.sleep(0.001)
        return len(steps) - begun

    async def leave() -> tuple[int, int]:
        groups = fresh.stream(question(samplings=(Sampling(1900),) * 3))
        await anext(groups)
        assert engine.running == 3
        await groups.aclose()
        first = await until_idle()
        task = asyncio.create_task(fresh.answer(question(most=1900)))
        while not engine.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return first, await until_idle()

    assert max(asyncio.run(asyncio.wait_for(leave(), 60))) < 50
    assert engine.running == 0


def test_questions_beyond_those_that_may_wait_are_refused(folder: Path) -> None:
    config = config_of(folder, rows=1, generator={"queued": 1})
    generator = Generator(folder / "backbone", config)

    async def crowd() -> list[BaseException | None]:
        running = generator.stream(question(most=1000))
        await anext(running)
        others = [asyncio.create_task(generator.answer(question(most=2))) for _ in range(4)]
        while sum(task.done() for task in others) < 3:
            await asyncio.sleep(0.01)
        await running.aclose()
        await asyncio.wait(others)
        return [task.exception() for task in others]

    errors = asyncio.run(asyncio.wait_for(crowd(), 20))
    refused = [error for error in errors if error is not None]
    assert len(refused) == 3
    assert all(isinstance(error, OverloadedError) and error.retry_after > 0 for error in refused)
    generator.close()


def test_engine_that_dies_is_told_to_all_and_makes_the_replica_unhealthy(
    fresh: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(fresh.check_health())

    def die() -> None:
        raise MemoryError("nothing left")

    monkeypatch.setattr(fresh._shared.engine, "step", die)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="nothing left"):
            use(fresh, question())
    with pytest.raises(RuntimeError, match="nothing left"):
        asyncio.run(fresh.check_health())

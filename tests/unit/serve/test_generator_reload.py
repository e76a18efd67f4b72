"""Adapters are exchanged while the generator answers: no answer is lost, mixed up or taken from before."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.errors import CheckpointError
from mmicl_core.serving.sampling import Sampling
from pipelines.serve.errors import UnknownModelError
from pipelines.serve.generator import Generator
from tests.methods import make_method
from tests.unit.serve.generating import (
    config_of,
    question,
    started,
    text,
    use,
    user_config,
    write_models,
    written_out,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), ("prompt_tuning", "lora", "aim"))


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """Its adapters may be overwritten."""
    return Path(shutil.copytree(models, tmp_path / "models"))


@pytest.fixture
def generator(folder: Path) -> Iterator[Generator]:
    made = Generator(folder / "backbone", config_of(folder))
    configure(made, folder, "prompt_tuning", "lora")
    yield made
    made.close()


def configure(generator: Generator, folder: Path, *names: str) -> None:
    asyncio.run(generator.reconfigure(user_config(folder, *names)))


def train_anew(folder: Path, name: str) -> None:
    """Other weights in the folder of an adapter."""
    method = make_method(name, load_backbone(folder / "backbone"), seed=7)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.mul_(3)
    method.save(folder / name, {})


@pytest.mark.parametrize("name", ["prompt_tuning", "lora"])
def test_adapter_that_was_trained_anew_never_answers_from_what_the_old_one_read(
    folder: Path, generator: Generator, name: str
) -> None:
    asked = question(model=f"tiny@{name}", most=12, **written_out(2, "the same"))
    old = text(use(generator, asked)[0])
    assert started(use(generator, asked)[0]).cached_tokens > 50
    train_anew(folder, name)
    configure(generator, folder, "prompt_tuning", "lora")
    (events,) = use(generator, asked)
    other = Generator(folder / "backbone", config_of(folder))
    configure(other, folder, "prompt_tuning", "lora")
    assert text(events) == text(use(other, asked)[0]) != old
    other.close()


@pytest.mark.parametrize("name", ["prompt_tuning", "lora"])
def test_answer_under_way_ends_with_the_adapter_that_it_began_with(
    folder: Path, generator: Generator, name: str
) -> None:
    asked = question(model=f"tiny@{name}", samplings=(Sampling(60, temperature=1.0, seed=3),))
    expected = text(use(generator, asked)[0])

    async def exchange_in_between() -> tuple[str, str]:
        groups = generator.stream(asked)
        events = list(await anext(groups))
        train_anew(folder, name)
        await generator.reconfigure(user_config(folder, "prompt_tuning", "lora"))
        after = await generator.answer(asked)
        async for group in groups:
            events += group
        return text(events), text(after)

    before, after = asyncio.run(exchange_in_between())
    assert before == expected != after


def test_questions_all_through_many_exchanges_are_all_answered_by_one_of_the_adapters(
    folder: Path, generator: Generator
) -> None:
    asked = question(model="tiny@lora", most=8)
    known = {text(use(generator, asked)[0])}

    async def ask(until: asyncio.Event) -> list[str]:
        found = list[str]()
        while not until.is_set():
            found.append(text(await generator.answer(asked)))
        return found

    async def run() -> list[str]:
        done = asyncio.Event()
        asking = [asyncio.create_task(ask(done)) for _ in range(4)]
        for seed in range(3):
            make_method("lora", load_backbone(folder / "backbone"), seed=seed + 20).save(folder / "lora", {})
            await generator.reconfigure(user_config(folder, "lora"))
            known.add(text(await generator.answer(asked)))
        done.set()
        return [one for found in await asyncio.gather(*asking) for one in found]

    answers = asyncio.run(asyncio.wait_for(run(), 60))
    assert len(answers) > 4 and set(answers) <= known


def test_backbones_of_adapters_that_are_gone_are_freed_when_their_last_answer_has_ended(
    folder: Path, generator: Generator
) -> None:
    backbone = weakref.ref(generator._models.get("tiny@lora").method.backbone)
    threads = threading.active_count()

    async def leave_while_it_answers() -> None:
        groups = generator.stream(question(model="tiny@lora", most=1500))
        await anext(groups)
        assert threading.active_count() > threads
        await generator.reconfigure(user_config(folder, "prompt_tuning"))
        gc.collect()
        assert backbone() is not None
        await anext(groups)
        await groups.aclose()
        for _ in range(500):
            if threading.active_count() <= threads:
                break
            await asyncio.sleep(0.01)

    asyncio.run(leave_while_it_answers())
    gc.collect()
    assert backbone() is None
    with pytest.raises(UnknownModelError):
        use(generator, question(model="tiny@lora"))


def test_reload_that_fails_leaves_the_old_adapters(folder: Path, generator: Generator) -> None:
    asked = question(model="tiny@prompt_tuning", most=8)
    before, models = text(use(generator, asked)[0]), asyncio.run(generator.models())
    (folder / "prompt_tuning" / "adapter_model.safetensors").write_bytes(b"torn")
    for names in (("prompt_tuning", "aim"), ("aim", "nowhere")):
        with pytest.raises(CheckpointError, match=r"torn|cannot be read|holds no adapter"):
            configure(generator, folder, *names)
    assert asyncio.run(generator.models()) == models
    assert text(use(generator, asked)[0]) == before


def test_loading_leaves_the_event_loop_and_the_answers_free(
    folder: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, may_load = threading.Event(), threading.Event()
    reload = generator._models.reload

    def slow(adapters: Any) -> None:
        loading.set()
        assert may_load.wait(20)
        reload(adapters)

    monkeypatch.setattr(generator._models, "reload", slow)

    async def answer_while_loading() -> str:
        exchange = asyncio.create_task(generator.reconfigure(user_config(folder, "aim")))
        while not loading.is_set():
            await asyncio.sleep(0.01)
        answer = text(await generator.answer(question(model="tiny@lora")))
        may_load.set()
        await exchange
        return answer

    assert asyncio.run(asyncio.wait_for(answer_while_loading(), 30))
    assert [one.id for one in asyncio.run(generator.models())] == ["tiny", "tiny@aim"]


def test_adapter_that_did_not_change_keeps_what_it_read(folder: Path, generator: Generator) -> None:
    asked = replace(question(model="tiny@lora", **written_out(2, "the same")))
    use(generator, asked)
    configure(generator, folder, "lora", "aim")
    assert started(use(generator, asked)[0]).cached_tokens > 50

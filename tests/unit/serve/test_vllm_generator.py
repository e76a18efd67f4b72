"""vLLM as the engine, by its contract: a stand-in with its names, which computes with the same weights."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mmicl_core.backbones.decoding import Decoding
from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.errors import CheckpointError, ConfigError, DataError
from mmicl_core.serving.choosing import choose, likelihood
from mmicl_core.serving.sampling import Sampling
from pipelines.serve.contracts import Piece, Question
from pipelines.serve.errors import DeadlineError, OverloadedError, UnavailableError
from pipelines.serve.generator import Generator
from pipelines.serve.vllm_generator import VllmGenerator
from tests.families import write_model
from tests.unit.serve.generating import (
    config_of,
    finished,
    fuse,
    question,
    started,
    text,
    use,
    user_config,
    write_models,
    written_out,
)

ADAPTERS = ("aim", "prompt_tuning", "mmict")


@dataclass
class Parameters:
    """vLLM's SamplingParams, as far as they are used."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    seed: int
    logprobs: int | None
    stop_token_ids: list[int]
    detokenize: bool
    output_kind: str

    def __post_init__(self) -> None:
        assert 0 < self.top_p <= 1 and -(2**63) <= self.seed < 2**63
        assert self.output_kind == "delta" and not self.detokenize


class Engine:
    """vLLM's AsyncLLM: outputs of one request hold what is new, the end token included."""

    def __init__(self, arguments: dict[str, Any], backbone: Any) -> None:
        self.arguments, self._backbone = arguments, backbone
        self.asked, self.aborted, self.errored = 0, 0, False

    async def generate(
        self, prompt: dict[str, torch.Tensor], parameters: Parameters, request_id: str
    ) -> AsyncGenerator[Any, None]:
        assert set(prompt) == {"prompt_embeds"} and request_id
        self.asked += 1
        try:
            async for output in self._outputs(prompt["prompt_embeds"], parameters):
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise

    async def _outputs(self, embeds_LD: torch.Tensor, parameters: Parameters) -> AsyncGenerator[Any, None]:
        sampling = Sampling(parameters.max_tokens, parameters.temperature, parameters.top_p, parameters.seed)
        mask_1L = torch.ones(1, len(embeds_LD), dtype=torch.long)
        nothing_1L = torch.zeros_like(mask_1L, dtype=torch.bool)
        prompt = Embedded(embeds_LD[None], mask_1L, nothing_1L, nothing_1L, mask_1L.cumsum(1) - 1)
        decoding = Decoding(self._backbone, prompt)
        for count in range(parameters.max_tokens):
            await asyncio.sleep(0)
            if self.errored:
                raise RuntimeError("EngineCore died")
            allowed_BV = decoding.scores_BV.clone()
            if count < parameters.min_tokens:
                allowed_BV[:, parameters.stop_token_ids] = float("-inf")
            (token,) = choose(allowed_BV, [sampling], [count])
            ends = token in parameters.stop_token_ids
            is_last = ends or count + 1 == parameters.max_tokens
            reason = ("stop" if ends else "length") if is_last else None
            told = self._told(decoding.scores_BV[0], token, parameters.logprobs)
            completion = SimpleNamespace(index=0, token_ids=[token], logprobs=told, finish_reason=reason)
            yield SimpleNamespace(outputs=[completion], finished=is_last)
            if is_last:
                return
            decoding.feed(torch.tensor([token]))

    def _told(self, scores_V: torch.Tensor, token: int, count: int | None) -> Any:
        if count is None:
            return None
        known = likelihood(scores_V, token, count)
        every = dict([*known.likeliest, (token, known.logprob)])
        return [{number: SimpleNamespace(logprob=logprob) for number, logprob in every.items()}]

    async def check_health(self) -> None:
        if self.errored:
            raise RuntimeError("EngineCore died")

    def shutdown(self) -> None:
        self.errored = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_models(tmp_path_factory.mktemp("models"), (*ADAPTERS, "lora", "mtv"))
    write_language_model(root / "language", load_backbone(root / "backbone"))
    return root


def write_language_model(folder: Path, backbone: Any, **changes: Any) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**backbone.text_config.to_dict(), **changes}))


@pytest.fixture(autouse=True)
def started_engines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Of a module `vllm` that is there for one test."""
    engines = list[Engine]()

    def start(arguments: dict[str, Any]) -> Engine:
        engines.append(Engine(arguments, load_backbone(folder / "backbone")))
        return engines[-1]

    vllm, sampling = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    for name, value in {
        "AsyncEngineArgs": dict,
        "AsyncLLMEngine": SimpleNamespace(from_engine_args=start),
        "SamplingParams": Parameters,
    }.items():
        setattr(vllm, name, value)
    setattr(sampling, "RequestOutputKind", SimpleNamespace(DELTA="delta"))  # noqa: B010
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", sampling)
    return engines


@pytest.fixture
def generator(folder: Path) -> Iterator[VllmGenerator]:
    made = VllmGenerator(folder / "backbone", config(folder))
    asyncio.run(made.reconfigure(user_config(folder, *ADAPTERS)))
    yield made
    made.close()


def config(folder: Path, language: str = "language", **more: Any) -> Any:
    return config_of(folder, vllm={"language_model": str(folder / language)}, **more)


def questions(folder: Path) -> list[Question]:
    drawn = tuple(
        Sampling(8, temperature=temperature, top_p=0.9, seed=seed, stop=("ba",), top_logprobs=2)
        for seed, temperature in ((1, 1.0), (2**63 + 1, 0.7), (3, 0.0))
    )
    return [
        question(),
        question(**written_out(2, "kept")),
        question(model="tiny@aim", fusion=fuse(folder, 3)),
        question(model="tiny@aim", fusion=fuse(folder, 2), samplings=drawn, **written_out(1, "kept")),
        question(model="tiny@prompt_tuning", samplings=drawn),
        question(model="tiny@mmict", **written_out(2)),
        question(samplings=(Sampling(40, ignore_eos=True),)),
    ]


def test_answers_and_counts_are_those_of_the_projects_own_engine(
    folder: Path, generator: VllmGenerator
) -> None:
    own = Generator(folder / "backbone", config_of(folder))
    asyncio.run(own.reconfigure(user_config(folder, *ADAPTERS)))
    assert asyncio.run(generator.models()) == asyncio.run(own.models())
    asked = questions(folder)
    for one, here, there in zip(asked, use(generator, *asked), use(own, *asked), strict=True):
        for index in range(len(one.samplings)):
            # The seeds of both are the same but for those that vLLM cannot hold.
            if one.samplings[index].seed < 2**63:
                assert text(here, index) == text(there, index)
                told = [finished(events)[index] for events in (here, there)]
                assert len({(end.reason, end.completion_tokens) for end in told}) == 1
                assert logprobs(here, index) == pytest.approx(logprobs(there, index), abs=1e-4)
        counts = [replace(started(events), cached_tokens=0, queued_ms=0, batch=0) for events in (here, there)]
        assert counts[0] == counts[1]
    own.close()


def logprobs(events: Any, index: int) -> list[float]:
    pieces = [event for event in events if isinstance(event, Piece) and event.index == index]
    return [
        value
        for piece in pieces
        for one in piece.logprobs
        for value in (one.logprob, *(other for _, other in one.likeliest))
    ]


def test_language_model_is_started_for_embeddings_without_what_would_mix_them_up(
    folder: Path, generator: VllmGenerator, started_engines: list[Engine]
) -> None:
    (engine,) = started_engines
    told = engine.arguments
    assert told["model"] == str(folder / "language") and told["dtype"] == "float32"
    assert told["enable_prompt_embeds"] and not told["enable_prefix_caching"]
    assert not told["trust_remote_code"] and told["gpu_memory_utilization"] == 0.6
    # What vLLM holds is not held twice.
    assert not len(generator._models.backbone.layers)


def test_answer_that_ends_before_a_stop_text_and_one_that_nobody_reads_are_aborted(
    generator: VllmGenerator, started_engines: list[Engine]
) -> None:
    (engine,) = started_engines
    (whole,) = use(generator, question(most=12))
    assert engine.aborted == 0
    stop = text(whole)[2:5]
    (events,) = use(generator, question(samplings=(Sampling(12, stop=(stop,)),)))
    assert text(events) == text(whole)[: text(whole).index(stop)].rstrip()
    assert engine.aborted == 1

    async def leave() -> None:
        groups = generator.stream(question(samplings=(Sampling(1900),) * 2))
        await anext(groups)
        await groups.aclose()

    asyncio.run(leave())
    with pytest.raises(DeadlineError):
        use(generator, question(most=1900, seconds=0.1))
    # Those that did not begin need no abortion.
    assert engine.aborted >= 2 and generator._running == 0


def test_vllm_that_dies_makes_the_replica_unavailable_and_unhealthy(
    generator: VllmGenerator, started_engines: list[Engine]
) -> None:
    asyncio.run(generator.check_health())
    started_engines[0].errored = True
    with pytest.raises(UnavailableError, match="EngineCore died"):
        use(generator, question())
    with pytest.raises(RuntimeError):
        asyncio.run(generator.check_health())


def test_questions_that_cannot_be_answered_are_refused(folder: Path, generator: VllmGenerator) -> None:
    for asked, reason in (
        (
            question(most=2048),
            r"the prompt takes \d+ tokens and the answer may take 2048, the model",
        ),
        (question("This is </s>"), "control token </s>"),
        (question(system="Be brief."), "takes no system message"),
    ):
        with pytest.raises(DataError, match=reason):
            use(generator, asked)
    full = VllmGenerator(folder / "backbone", config(folder, rows=1, generator={"queued": 1}))

    async def crowd() -> None:
        first = full.stream(question(samplings=(Sampling(500),) * 2))
        await anext(first)
        with pytest.raises(OverloadedError):
            await full.answer(question())
        await first.aclose()

    asyncio.run(crowd())
    full.close()


@pytest.mark.parametrize("name", ["lora", "mtv"])
def test_adapter_that_changes_the_language_model_is_refused_and_the_others_stay(
    folder: Path, generator: VllmGenerator, name: str
) -> None:
    before = asyncio.run(generator.models())
    with pytest.raises(CheckpointError, match="which changes the language model, and vLLM runs"):
        asyncio.run(generator.reconfigure(user_config(folder, "aim", name)))
    assert asyncio.run(generator.models()) == before


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_vl", "puts pictures in rows and columns"),
        ("gemma3", "lets its pictures see all of themselves"),
        ("paligemma", "lets its prefix see all of themselves"),
        ("blip_2_t5", "has its answers in a decoder"),
    ],
)
def test_model_whose_prompts_are_more_than_embeddings_is_refused(
    folder: Path, tmp_path: Path, family: str, reason: str
) -> None:
    write_model(family, tmp_path / family)
    with pytest.raises(ConfigError, match=f"{reason}: leave serve.vllm out"):
        VllmGenerator(tmp_path / family, config(folder))


def test_language_model_of_another_size_or_none_is_refused(folder: Path, tmp_path: Path) -> None:
    write_language_model(tmp_path / "wide", load_backbone(folder / "backbone"), hidden_size=64)
    for language, found in (("wide", "64"), ("nowhere", "None")):
        with pytest.raises(ConfigError, match=f"says hidden_size {found}, the language model .* has 32: set"):
            VllmGenerator(
                folder / "backbone", config_of(folder, vllm={"language_model": str(tmp_path / language)})
            )


def test_missing_vllm_is_told_with_a_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vllm cannot be imported .*: install the package vllm, or leave"):
        VllmGenerator(folder / "backbone", config(folder))

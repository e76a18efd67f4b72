"""Deployment: questions -> text by vLLM, in the place of the project's own engine.

    question --vision tower, projector, fused tokens--> prompt of embeddings --vLLM--> tokens --> events

The language model runs in vLLM alone; here, its blocks are let go, and what looks and embeds stays. Limits,
each of which is refused with a reason where it is met:

    models      language models that read embeddings at counted positions, each token what came before: no
                rows and columns or features between layers (Qwen-VL), no pictures or prefixes that see all
                of themselves (Gemma 3, PaliGemma), no encoder-decoders
    adapters    those that change prompts alone (AIM, M-Hub, prompt tuning), and not the language model
                (LoRA, LCL, M2PT, MTV)
    prefixes    nothing is kept: some versions of vLLM name what they keep by token ids, which prompts of
                embeddings do not have, and would mix up two of the same length
    texts       of a batch are equal to those alone as far as vLLM's own arithmetic is
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.serve import ServeConfig, VllmConfig
from mmicl_core.errors import CheckpointError, ConfigError
from mmicl_core.methods import METHODS, read_settings
from mmicl_core.methods.base import Method
from mmicl_core.serving.jobs import Begun, Ended, Grown, Job
from mmicl_core.serving.prefill import embed_alone
from mmicl_core.serving.sampling import Likelihood, Sampling
from pipelines.serve.asking import Preparation
from pipelines.serve.contracts import Event, Question, ServedModel
from pipelines.serve.errors import OverloadedError, UnavailableError
from pipelines.serve.loaded import LoadedModels
from pipelines.serve.telling import Teller, late

__all__ = ["VllmGenerator"]

log = logging.getLogger("ray.serve")


class VllmGenerator:
    """Answers questions. Adapters come with `reconfigure`.

    Args:
        backbone: folder of the model.
        config: of the server, with `vllm`.

    Raises:
        ConfigError: vLLM is missing, or cannot take what this model's prompts are.
    """

    def __init__(self, backbone: Path, config: ServeConfig) -> None:
        assert config.vllm is not None
        self._config = config
        self._models = LoadedModels(backbone, config.model_name)
        _refuse_other_prompts(self._models.backbone)
        _refuse_another_language_model(self._models.backbone, config.vllm)
        # vLLM holds them, and needs the memory.
        del self._models.backbone.layers[:]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._vllm = _import("vllm")
        self._delta = _import("vllm.sampling_params").RequestOutputKind.DELTA
        self._engine = _start(self._vllm, config.vllm, self._models.backbone)
        self._preparation = Preparation(config)
        self._arithmetic = ThreadPoolExecutor(1, "arithmetic")
        self._exchange = asyncio.Lock()
        self._running = 0

    def close(self) -> None:
        """End vLLM and the threads."""
        self._preparation.close()
        self._arithmetic.shutdown(wait=False, cancel_futures=True)
        self._engine.shutdown()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve these adapters and no others; answers under way end with those that they began with.

        Args:
            user_config: {"adapters": {name: {"folder": ...}}}.

        Raises:
            CheckpointError: one cannot be loaded, or changes the language model; all stay as they were.
        """
        folders = {name: resolve(about["folder"]) for name, about in user_config["adapters"].items()}
        for name, folder in folders.items():
            _refuse_unless_it_leaves_the_language_model(name, folder)
        async with self._exchange:
            named = {name: str(folder) for name, folder in folders.items()}
            await asyncio.to_thread(self._models.reload, named)

    async def check_health(self) -> None:
        """Make sure that vLLM works. Raises what it raises."""
        await self._engine.check_health()

    async def models(self) -> tuple[ServedModel, ...]:
        """All that it serves, the base model first."""
        return tuple(loaded.served for loaded in self._models.all())

    async def answer(self, question: Question) -> tuple[Event, ...]:
        """All events at once. Raises as `stream` does."""
        async with aclosing(self.stream(question)) as groups:
            return tuple([event async for group in groups for event in group])

    async def stream(self, question: Question) -> AsyncGenerator[tuple[Event, ...], None]:
        """Events as they happen, in groups of those that happened together.

        Raises:
            DataError: what was asked cannot be answered.
            BankError: its pack is gone, damaged, or of another model.
            DeadlineError: it came too late.
            OverloadedError: too many questions wait.
            UnavailableError: vLLM has died.
        """
        arrived = time.monotonic()
        deadline = asyncio.get_running_loop().time() + question.seconds
        if self._running >= self._config.rows + self._config.generator.queued:
            raise OverloadedError(f"{self._running} answers grow or wait in this replica: ask again later")
        try:
            async with asyncio.timeout_at(deadline):
                teller, prompt_TD, demo_tokens = await self._prepare(question, arrived)
        except TimeoutError as error:
            raise late(question) from error
        self._running += len(question.samplings)
        teller.tell(Begun(len(prompt_TD), 0, demo_tokens, time.monotonic(), self._running))
        answers = [
            asyncio.create_task(self._grow(teller, prompt_TD, index, sampling))
            for index, sampling in enumerate(question.samplings)
        ]
        try:
            async for group in teller.groups(deadline):
                yield group
        finally:
            self._running -= len(answers)
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    async def _prepare(self, question: Question, arrived: float) -> tuple[Teller, Tensor, int]:
        loaded = self._models.get(question.model)
        method = self._models.all()[0].method if loaded.served.fuses else loaded.method
        asked = await self._preparation.prepare(question, loaded, method, None)
        teller = Teller(question, asked.saved, method.backbone.tokenizer, arrived)
        job = Job(
            method,
            question.turns,
            asked.pictures,
            question.samplings,
            teller.tell,
            fused=asked.fused,
            system=question.system,
        )
        loop = asyncio.get_running_loop()
        prompts, demo_tokens = await loop.run_in_executor(self._arithmetic, embed_alone, job)
        prompt_TD = prompts.embeds_BLD[0].cpu()
        job.refuse_longer_than(loaded.served.context_length, len(prompt_TD))
        return teller, prompt_TD, demo_tokens

    async def _grow(self, teller: Teller, prompt_TD: Tensor, index: int, sampling: Sampling) -> None:
        """One answer. vLLM knows no seeds of single answers of a request, so that each is its own."""
        end = self._models.backbone.tokenizer.eos_token_id
        outputs = self._engine.generate(
            {"prompt_embeds": prompt_TD}, self._parameters(sampling), uuid.uuid4().hex
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    (completion,) = output.outputs
                    for token, likelihood in _tokens(completion, sampling):
                        if token != end and index not in teller.stopped:
                            teller.tell(Grown(index, token, likelihood))
                    if index in teller.stopped:
                        break
                    if output.finished:
                        teller.tell(Ended(index, _reason(completion)))
                    teller.send(teller.collect())
        # Whatever it is, the asker waits for it.
        except Exception as error:
            teller.send([self._explain(error)])
        teller.send(teller.collect())

    def _explain(self, error: Exception) -> Exception:
        if not getattr(self._engine, "errored", False):
            return error
        log.error("vLLM has died", exc_info=error)
        return UnavailableError(f"vLLM of this replica has died: {error!r}")

    def _parameters(self, sampling: Sampling) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            # Before so many, it bans the token that ends an answer.
            min_tokens=sampling.max_new_tokens if sampling.ignore_eos else 0,
            temperature=sampling.temperature,
            # Nothing at all is no share to vLLM; the smallest one holds the likeliest token alone.
            top_p=max(sampling.top_p, 1e-6),
            # It takes signed numbers of 64 bits.
            seed=sampling.seed % 2**63,
            logprobs=sampling.top_logprobs,
            # It has no tokenizer: texts, and what ends them, are made of the tokens here.
            stop_token_ids=[self._models.backbone.tokenizer.eos_token_id],
            detokenize=False,
            output_kind=self._delta,
        )


def _tokens(completion: Any, sampling: Sampling) -> Iterator[tuple[int, Likelihood | None]]:
    """What an output adds. vLLM tells of the token that was taken also where it is none of the likeliest."""
    count = sampling.top_logprobs
    for place, token in enumerate(completion.token_ids):
        if count is None:
            yield token, None
            continue
        told = completion.logprobs[place]
        ranked = sorted(told.items(), key=lambda item: -item[1].logprob)
        likeliest = tuple((number, one.logprob) for number, one in ranked[:count])
        yield token, Likelihood(token, told[token].logprob, likeliest)


def _reason(completion: Any) -> Literal["stop", "length"]:
    return "length" if completion.finish_reason == "length" else "stop"


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"serve.vllm is set, but {module} cannot be imported ({error}): install the package vllm, or "
            "leave serve.vllm out"
        ) from error


def _start(vllm: Any, config: VllmConfig, backbone: HuggingFaceBackbone) -> Any:
    # An engine that cannot start says so by many kinds of errors; all of them are told as they are.
    return vllm.AsyncLLMEngine.from_engine_args(
        vllm.AsyncEngineArgs(
            model=config.language_model,
            dtype=str(backbone.dtype).removeprefix("torch."),
            gpu_memory_utilization=config.memory_share,
            enable_prompt_embeds=True,
            enable_prefix_caching=False,
            trust_remote_code=False,
            skip_tokenizer_init=True,
        )
    )


def _refuse_other_prompts(backbone: HuggingFaceBackbone) -> None:
    family = backbone.family
    reasons = {
        "puts pictures in rows and columns": family.positions != "counted",
        f"lets its {family.attends} see all of themselves": family.attends != "causal",
        "has its answers in a decoder": family.decoder is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"serve.vllm reads prompts as embeddings alone, but this {family.model_type} {reason}: leave "
                "serve.vllm out"
            )


def _refuse_another_language_model(backbone: HuggingFaceBackbone, config: VllmConfig) -> None:
    path = Path(config.language_model) / "config.json"
    told: Mapping[str, Any] = {}
    with suppress(OSError, ValueError):
        told = json.loads(path.read_text(encoding="utf-8"))
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        theirs, ours = told.get(name), getattr(backbone.text_config, name, None)
        if theirs != ours:
            raise ConfigError(
                f"{path} says {name} {theirs}, the language model of the backbone has {ours}: set "
                "serve.vllm.language_model to the folder of its language model alone"
            )


def _refuse_unless_it_leaves_the_language_model(name: str, folder: Path) -> None:
    kind = METHODS[read_settings(folder).type]
    if kind.changes_backbone or kind.applied is not Method.applied:
        raise CheckpointError(
            f"adapter {name!r} in {folder} is of {kind.__name__}, which changes the language model, and vLLM "
            "runs that as it is: leave the adapter out of serve.adapters, or leave serve.vllm out"
        )

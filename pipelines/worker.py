"""What each worker of a training runs: the same method on every one, and its share of every step.

build, restore --> [read ahead --> vote, forward, backward, update --> note] per step --> checkpoints
"""

from __future__ import annotations

import math
import random
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.run import RunConfig
from mmicl_core.errors import TrainingError
from mmicl_core.methods import build_method
from mmicl_core.methods.base import Method
from mmicl_core.training.checkpoint import load_state
from mmicl_core.training.flops import arithmetic_of, peak_of_device
from mmicl_core.training.schedule import rate_of_step
from mmicl_core.training.step import MicroBatch, StepMetrics, mean_loss, train_step
from pipelines.feed import Ahead, Feed
from pipelines.gauges import TrainingGauges
from pipelines.journal import Journal, checkpoints_in
from pipelines.materials import Materials
from pipelines.watch import Place, naming_the_worker, watching
from pipelines.zero import ZeroEngine, at_hand, computes_in_bf16, loading_in_pieces, shapes_of

__all__ = ["Job", "train_worker"]

KIB = 1024
# Said of a step only if it was.
WHERE_SKIPPED = ("skipped", "bad_episodes")


@dataclass(frozen=True)
class Job:
    """What all workers of a run are told; it travels to them."""

    run: RunConfig
    materials: Materials
    held_out: tuple[RunConfig, Materials] | None
    work: Path
    counter: Any
    watch: Any


def train_worker(settings: Mapping[str, Any]) -> None:
    """Train as one of the workers that Ray Train started."""
    job: Job = ray.get(settings["job"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    train = job.run.train
    torch.set_num_threads(train.threads_per_worker)
    torch.manual_seed(train.seed)
    place = Place()
    with naming_the_worker(rank, place):
        method = _build(job.run, job.materials)
        with watching(job.watch, settings["attempt"], rank, world_size, method, place):
            _Worker(job, method, rank, world_size, place).train()


def _build(run: RunConfig, materials: Materials) -> Method:
    dtype = torch.bfloat16 if computes_in_bf16(run.train) else torch.float32
    with loading_in_pieces(run.train):
        backbone = load_backbone(materials.backbone, dtype=dtype, attention=run.train.attention)
    # What is trained may begin as the token embeddings are spread.
    with at_hand(backbone.model.get_input_embeddings().parameters()):
        method = build_method(backbone, run.method)
    if run.train.gradient_checkpointing:
        backbone.checkpoint_gradients()
    for parameter in method.parameters():
        # Not all of the module: sines and cosines of positions stay in 32 bits.
        parameter.data = parameter.data.to(dtype)
    return method.to(get_device())


class _Worker:
    """One worker, from its last checkpoint to the end."""

    def __init__(self, job: Job, method: Method, rank: int, world_size: int, place: Place) -> None:
        self.run, self.train_config, self.place = job.run, job.run.train, place
        self.method, self.rank, self.world_size = method, rank, world_size
        newest = checkpoints_in(job.work, self.train_config).newest()
        state = load_state(newest, shapes_of(method)) if newest else None
        self.first = state.step if state else 0
        self.facts: dict[str, Any] = dict(state.facts) if state else {}
        place.at("deepspeed.initialize")
        self.engine = ZeroEngine(method, self.train_config, state)
        self.arithmetic = arithmetic_of(method, recomputes=self.train_config.gradient_checkpointing)
        self.peak = peak_of_device()
        self.feed = Feed(self.run, method, job.materials)
        self.held_out = Feed(job.held_out[0], method, job.held_out[1]) if job.held_out else None
        method.looks = self.feed.looks
        self.journal = self._open_journal(job) if rank == 0 else None
        self.gauges = TrainingGauges(job.work.stem, self.train_config.steps, world_size)
        self.bad = 0

    def train(self) -> None:
        """Take all steps that are left, unless validation stops earlier."""
        ahead = Ahead(self._read, range(self.first, self.train_config.steps))
        try:
            for step in range(self.first, self.train_config.steps):
                self.place.step = step + 1
                if self.facts.get("stopped"):
                    break
                self._step(step, ahead)
                self._after(step + 1)
        finally:
            ahead.close()
        if self.journal is not None:
            self.place.at("the end of its log")
            self.journal.close()

    def _open_journal(self, job: Job) -> Journal:
        settings = job.run.model_dump(mode="json")
        journal = Journal(job.work, self.first, self.train_config, settings, job.counter)
        journal.describe(self.engine.describe() | {"deepspeed": self.engine.config})
        return journal

    def _read(self, step: int) -> list[MicroBatch]:
        return self.feed.micro_batches(step, self.rank, self.world_size)

    def _calls(self, micro_batches: list[MicroBatch]) -> list[Mapping[str, int]]:
        return [self.method.calls(micro.batch) for micro in micro_batches]

    def _step(self, step: int, ahead: Ahead[list[MicroBatch]]) -> None:
        begun = time.monotonic()
        self.place.at("the wait for its data")
        micro_batches = ahead.take()
        waited = time.monotonic() - begun
        calls = self._calls(micro_batches)
        self.place.calls = {name: sum(called[name] for called in calls) for name in calls[0]}
        self.place.at("the vote of the workers")
        # Dropout is a function of the step too, so that a run that was stopped ends as one that was not.
        torch.manual_seed(random.Random(f"{self.train_config.seed}/{step}/{self.rank}").getrandbits(63))
        metrics = train_step(
            self.engine, micro_batches, calls, rate_of_step(step, self.train_config), self.place.at
        )
        seconds = time.monotonic() - begun
        self.facts["seconds"] = self.facts.get("seconds", 0.0) + seconds
        self._note(step, metrics, waited, seconds - waited)
        self._count_bad(metrics, micro_batches)

    def _note(self, step: int, metrics: StepMetrics, waited: float, computed: float) -> None:
        if self.journal is None:
            return
        self.journal.count(metrics.loss)
        config = self.train_config
        rate = rate_of_step(step, config) * config.learning_rate
        self.gauges.step(
            step + 1,
            metrics,
            episodes=config.global_batch,
            data_seconds=waited,
            compute_seconds=computed,
            operations=self.arithmetic.of(metrics.tokens, metrics.targets),
            learning_rate=rate,
        )
        if metrics.skipped or step % config.log_every == 0 or step + 1 == config.steps:
            seconds = waited + computed
            line: dict[str, Any] = {
                "step": step + 1,
                "learning_rate": rate,
                **{name: value for name, value in vars(metrics).items() if name not in WHERE_SKIPPED},
                **({name: getattr(metrics, name) for name in WHERE_SKIPPED} if metrics.skipped else {}),
                "data_seconds": round(waited, 6),
                "compute_seconds": round(computed, 6),
                "workers": self.world_size,
                **self._speed(metrics, seconds),
                "episodes_per_second": config.global_batch / seconds,
                "tokens_per_second": metrics.tokens / seconds,
            }
            counted = {"replaced": self.feed.replaced, "cut": self.method.cut}
            line |= {name: dict(counts) for name, counts in counted.items() if counts}
            self.journal.note(line)

    def _speed(self, metrics: StepMetrics, seconds: float) -> dict[str, float]:
        """TFLOP/s of all workers, and their share of the peak where that is known."""
        done = self.arithmetic.of(metrics.tokens, metrics.targets) / seconds
        speed = {"tflops_per_second": done / 1e12}
        if self.peak is not None:
            speed["mfu"] = done / (self.peak * self.world_size)
        return speed

    def _count_bad(self, metrics: StepMetrics, micro_batches: list[MicroBatch]) -> None:
        self.bad = self.bad + 1 if metrics.skipped else 0
        self.facts["skipped"] = self.facts.get("skipped", 0) + metrics.skipped
        if self.bad < self.train_config.bad_steps:
            return
        named = metrics.bad_episodes or tuple(name for micro in micro_batches for name in micro.episodes)
        raise TrainingError(
            f"loss or gradient were not finite in {self.bad} steps in a row (train.bad_steps), each of "
            f"which was skipped; the last with episodes {', '.join(named)}. Look at them with `mmicl "
            "episodes show ID`, or lower train.learning_rate"
        )

    def _after(self, step: int) -> None:
        config = self.train_config
        last = step == config.steps
        validates = config.validation.every is not None and (step % config.validation.every == 0 or last)
        if validates:
            self._validate(step)
        if validates or last or step % config.checkpoints.every == 0:
            self._checkpoint(step)

    def _validate(self, step: int) -> None:
        assert self.held_out is not None
        self.place.at("validation")
        with self.engine.evaluating():
            batches = self.held_out.once(self.rank, self.world_size)
            loss = mean_loss(self.engine, ((micro, self._calls(micro)) for micro in batches))
        best = self.facts.get("best_loss")
        is_better = math.isfinite(loss) and (best is None or loss < best)
        self.facts |= {
            "validation_loss": loss,
            "best_loss": loss if is_better else best,
            "without_progress": 0 if is_better else self.facts.get("without_progress", 0) + 1,
        }
        patience = self.train_config.validation.patience
        self.facts["stopped"] = patience is not None and self.facts["without_progress"] >= patience
        if self.journal is not None:
            self.journal.note({"step": step, "validation_loss": loss})
            self.gauges.validation(loss)

    def _checkpoint(self, step: int) -> None:
        self.place.at("its checkpoint")
        begun = time.monotonic()
        rows = {"seed": self.train_config.seed, "rows": step * self.train_config.global_batch}
        state = self.engine.state(self.facts | rows, step)
        # The loss belongs to this checkpoint alone.
        self.facts.pop("validation_loss", None)
        peaks = self.engine.gather([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB])
        if self.journal is not None and state is not None:
            path = self.journal.checkpoint(state)
            self.journal.describe(
                self.engine.describe()
                | {"deepspeed": self.engine.config, "peak_host_bytes": [int(peak) for (peak,) in peaks]}
                | self._cost_of(path, time.monotonic() - begun)
            )
        ray.train.report({"step": step})

    def _cost_of(self, path: Path, seconds: float) -> dict[str, Any]:
        size = sum(file.stat().st_size for file in path.iterdir())
        cost = {"seconds": round(seconds, 3), "bytes": size, "gathered": self.engine.gathered_elements}
        return {"checkpoint": cost}

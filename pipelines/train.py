"""Ray Train: the workers that train a method under ZeRO-3.

`train` prepares what the method reads, starts the workers and waits. Each worker builds the same
method, restores the last checkpoint and takes its share of every step. A killed run, started again,
goes on from its last checkpoint, on any number of workers.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import backbone_identity, load_backbone
from mmicl_core.config.model import MethodConfig, MtvConfig, SupConConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.train import TrainConfig
from mmicl_core.data.files import write_atomic
from mmicl_core.errors import find_mistake
from mmicl_core.methods import build_method
from mmicl_core.methods.adapter import CONFIG_FILE, adapter_identity
from mmicl_core.methods.base import Method
from mmicl_core.training.checkpoint import TrainState, has_state, load_state, save_state
from mmicl_core.training.step import StepMetrics, learning_rate, train_step
from pipelines.environment import code_revision
from pipelines.feed import Feed
from pipelines.fit import fit
from pipelines.materials import Materials, prepare
from pipelines.progress import counting
from pipelines.stages import Stage

__all__ = ["METRICS_FILE", "RESULT", "train"]

log = logging.getLogger("mmicl")

CHECKPOINT = "checkpoint"
METRICS_FILE = "metrics.jsonl"
PARTITION_FILE = "partition.json"
RESULT = "result"
MAX_FAILURES = 3


def train(run: RunConfig, root: Path) -> Stage:
    """Train what `run` asks for; the result, in the form that is used afterwards, is in `result`.

    The manifest holds `steps`, `world_size`, `zero_stage`, `partition`, `loss_first`, `loss_last`.
    """
    materials = prepare(run, root)
    run, named = _resolve_start(run)
    stage = Stage(
        root,
        f"train-{run.method.type}",
        train=run.train,
        method=named,
        materials=materials.names(),
    )
    # Checkpoints outlive a failed run, so they cannot lie in the folder that appears when it ends.
    work = root.absolute() / f"{stage.folder.name}.work"

    def build(folder: Path) -> dict[str, Any]:
        about = {"backbone_name": run.backbone.path, "code": code_revision()}
        if isinstance(run.method, MtvConfig):
            return fit(run, materials, folder / RESULT, about)
        work.mkdir(parents=True, exist_ok=True)
        with counting("Training", run.train.steps) as counter:
            settings = {
                "run": run.model_dump(mode="json"),
                "materials": materials,
                "work": str(work),
                "counter": counter,
            }
            _fit(settings, run.train, work)
        return _collect(run, materials, work, folder, about)

    manifest = stage.run(build)
    if "partition" in manifest:
        partition = manifest["partition"]
        log.info(
            "ZeRO stage %d: each of %d workers holds %d of the %d elements of %s",
            manifest["zero_stage"],
            manifest["world_size"],
            partition["shard_elements"],
            partition["full_elements"],
            partition["parameter"],
        )
    shutil.rmtree(work, ignore_errors=True)
    return stage


def _resolve_start(run: RunConfig) -> tuple[RunConfig, MethodConfig]:
    """The run with its start where the workers find it, and the method as it names what is trained: by what
    lies in folders, wherever they are."""
    method = run.method
    if isinstance(method, SupConConfig):
        # Which teacher it was, the name of the materials says.
        return run, method.model_copy(update={"teacher": None})
    if method.start is None:
        return run, method
    folder = resolve(method.start)
    is_adapter = (folder / CONFIG_FILE).is_file()
    identity = adapter_identity(folder) if is_adapter else backbone_identity(folder)
    found = method.model_copy(update={"start": str(folder)})
    return run.model_copy(update={"method": found}), method.model_copy(update={"start": identity})


def _collect(
    run: RunConfig, materials: Materials, work: Path, folder: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Turn the last checkpoint into the result; gives what the manifest says of the run."""
    method = build_method(load_backbone(materials.backbone), run.method)
    state = load_state(work / CHECKPOINT, _shapes(method))
    with torch.no_grad():
        for name, parameter in method.trainable().items():
            parameter.copy_(state.parameters[name].value)
    summary = _summary(work)
    metrics = {key: summary[key] for key in ("steps", "loss_first", "loss_last")}
    method.save(folder / RESULT, about | {"metrics": metrics})
    shutil.copy(work / METRICS_FILE, folder / METRICS_FILE)
    return summary


def _fit(settings: dict[str, Any], config: TrainConfig, work: Path) -> None:
    for tries_left in reversed(range(1 + MAX_FAILURES)):
        failure = _try_to_fit(settings, config, work)
        if failure is None:
            return
        # A mistake comes back at every try; a worker or a machine that was lost need not.
        if not tries_left or find_mistake(failure) is not None:
            raise failure
        log.info("Training broke off (%s) and goes on from its last checkpoint", type(failure).__name__)


def _try_to_fit(settings: dict[str, Any], config: TrainConfig, work: Path) -> BaseException | None:
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            _trainer(settings, config, work).fit()
        except BaseException as failure:
            # The thread that waits looks into it.
            failures.append(failure)

    # Ray Train takes Ctrl-C over in the main thread, also for the time after training, and then waits
    # for what it stops; left to Python, Ctrl-C ends this program and with it everything that it started.
    # The main thread only waits meanwhile, so that an interruption never meets it inside Ray's own calls.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    thread.join()
    return failures[0] if failures else None


def _trainer(settings: dict[str, Any], config: TrainConfig, work: Path) -> TorchTrainer:
    gpus = ray.cluster_resources().get("GPU", 0) >= config.num_workers
    resources = {"CPU": config.threads_per_worker} | ({"GPU": 1} if gpus else {})
    return TorchTrainer(
        _train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=gpus, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=ray.train.RunConfig(name="ray", storage_path=str(work)),
    )


def _shapes(method: Method) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in method.trainable().items()}


def _summary(work: Path) -> dict[str, Any]:
    lines = (work / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    summary: dict[str, Any] = json.loads((work / PARTITION_FILE).read_text(encoding="utf-8"))
    return summary | {"loss_first": losses[0], "loss_last": losses[-1]}


def _train_worker(settings: dict[str, Any]) -> None:
    # Deepspeed is imported where it works: on import it probes the machine.
    from pipelines.zero3 import ZERO_STAGE, ZeroEngine

    run = RunConfig.model_validate(settings["run"])
    materials: Materials = settings["materials"]
    work = Path(settings["work"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(run.train.threads_per_worker)
    torch.manual_seed(run.train.seed)
    backbone = load_backbone(materials.backbone, attention=run.train.attention)
    method = build_method(backbone, run.method).to(get_device())
    saved = work / CHECKPOINT
    state = load_state(saved, _shapes(method)) if has_state(saved) else None
    first = state.step if state else 0
    engine = ZeroEngine(method, run.train, state)
    feed = Feed(run, method, materials)
    journal = _Journal(work, first, run.train, settings["counter"], writes=rank == 0)
    journal.describe(engine.largest_partition() | {"world_size": world_size, "zero_stage": ZERO_STAGE})
    for step in range(first, run.train.steps):
        rate = learning_rate(step, run.train.steps, run.train.warmup_steps, run.train.learning_rate)
        metrics = train_step(engine, feed.micro_batches(step, rank, world_size), rate)
        journal.note(step, rate, metrics, {"replaced": feed.replaced, "cut": method.cut})
        if (step + 1) % run.train.checkpoint_every == 0 or step + 1 == run.train.steps:
            journal.checkpoint(engine.state(step + 1))
            ray.train.report(vars(metrics))
    journal.close()


class _Journal:
    """What the first worker writes down: metrics, progress, checkpoints."""

    def __init__(self, work: Path, first: int, config: TrainConfig, counter: Any, *, writes: bool) -> None:
        self._work, self._config, self._counter, self._writes = work, config, counter, writes
        self._path = work / METRICS_FILE
        if writes:
            # Steps after the last checkpoint are taken again: their lines go.
            old = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            kept = [line for line in old if json.loads(line)["step"] <= first]
            write_atomic(self._path, "".join(line + "\n" for line in kept))
            ray.get(counter.resume.remote(first))

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Keep what is known once the engine stands."""
        if self._writes:
            partition = {"steps": self._config.steps} | dict(facts)
            write_atomic(self._work / PARTITION_FILE, json.dumps(partition))

    def note(
        self, step: int, rate: float, metrics: StepMetrics, counted: Mapping[str, Mapping[str, int]]
    ) -> None:
        """Count a step; every `log_every`th is written down, with what this worker counted so far: streamed
        episodes that were replaced, texts that were cut."""
        if not self._writes:
            return
        self._counter.add.remote(1, f"loss {metrics.loss:.3f}")
        if step % self._config.log_every == 0 or step + 1 == self._config.steps:
            line = {"step": step + 1, "learning_rate": rate} | vars(metrics)
            line |= {name: dict(counts) for name, counts in counted.items() if counts}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Wait until all steps are counted."""
        if self._writes:
            ray.get(self._counter.add.remote(0))

    def checkpoint(self, state: TrainState) -> None:
        """Replace the checkpoint."""
        if self._writes:
            save_state(self._work / CHECKPOINT, state)

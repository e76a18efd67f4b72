"""Ray Train: the driver of a training.

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
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import backbone_identity, load_backbone, outline_backbone
from mmicl_core.config.model import MethodConfig, MtvConfig, SupConConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.train import ElasticWorkers, TrainConfig
from mmicl_core.errors import TrainingError, find_mistake
from mmicl_core.evaluation.training_report import write_training_page
from mmicl_core.methods import build_method
from mmicl_core.methods.adapter import CONFIG_FILE, adapter_identity
from mmicl_core.methods.base import Method
from mmicl_core.training.checkpoint import load_state
from pipelines.environment import code_revision
from pipelines.fit import fit
from pipelines.journal import ENGINE_FILE, METRICS_FILE, checkpoints_in
from pipelines.materials import Materials, prepare, prepare_held_out
from pipelines.mirror import Mirror
from pipelines.preflight import check_output
from pipelines.progress import counting
from pipelines.stages import Stage, read_manifest
from pipelines.trackers import check_trackers
from pipelines.watch import start_watch
from pipelines.worker import Job, train_worker
from pipelines.zero import EMA, deepspeed_config, shapes_of

__all__ = ["METRICS_FILE", "RESULT", "train", "training_stage", "try_out"]

log = logging.getLogger("mmicl")

RESULT = "result"
PAGE = "training.html"
# Of a value, its two moments and its average; one checkpoint is written anew beside those that are kept.
BYTES_OF_A_NUMBER = 4


def train(run: RunConfig, root: Path) -> Stage:
    """Train what `run` asks for; the result, in the form that is used afterwards, is in `result`.

    The manifest holds `steps`, `seconds` (of all steps together, with the wait for their data),
    `trained_parameters`, `world_size`, `zero_stage`, `partition`, `loss_first`, `loss_last`, `code`.

    Raises:
        ConfigError: the run cannot start: its folder, its trackers, or its settings together.
        TrainingError: it cannot go on; names the worker, where it was and why.
    """
    check_trackers(run.train.trackers)
    materials = prepare(run, root)
    run, stage = training_stage(run, materials, root)
    # Checkpoints outlive a failed run, so they cannot lie in the folder that appears when it ends.
    work = root.absolute() / f"{stage.folder.name}.work"

    def build(folder: Path) -> dict[str, Any]:
        about = {"backbone_name": run.backbone.path, "code": code_revision()}
        if isinstance(run.method, MtvConfig):
            return fit(run, materials, folder / RESULT, about) | {"code": about["code"]}
        outline = build_method(outline_backbone(materials.backbone), run.method)
        check_output(root, _checkpoint_bytes(run.train, outline))
        _announce(run.train, outline)
        work.mkdir(parents=True, exist_ok=True)
        config = run.train
        Mirror.of(config.checkpoints.mirror, work.name, checkpoints_in(work, config)).fetch()
        watch = start_watch(config.stall_seconds)
        with counting("Training", config.steps) as counter:
            job = Job(run, materials, prepare_held_out(run, root), work, counter, watch)
            _fit(job)
        return _collect(run, materials, work, folder, about) | {"code": about["code"]}

    manifest = stage.run(build)
    if "partition" in manifest:
        _tell(manifest)
    shutil.rmtree(work, ignore_errors=True)
    return stage


def try_out(run: RunConfig, root: Path) -> dict[str, Any]:
    """Take one step: corpus, model and workers as they will be, as many episodes as the step needs, and
    nothing kept of what it trained.

    Raises:
        ConfigError, DataError, BackboneError, TrainingError: what the whole run would meet at its start.
    """
    stage = run.episodes.stages[0].model_copy(update={"episodes": run.train.global_batch})
    checked = {"episodes": min(run.train.validation.episodes, run.train.global_batch), "patience": None}
    if run.train.validation.every is not None:
        checked["every"] = 1
    changes = {
        "steps": 1,
        "trackers": (),
        "validation": run.train.validation.model_copy(update=checked),
        "checkpoints": run.train.checkpoints.model_copy(update={"mirror": None}),
    }
    small = run.model_copy(
        update={
            "episodes": run.episodes.model_copy(update={"stages": (stage,), "preset": None}),
            "train": run.train.model_copy(update=changes),
        }
    )
    made = train(small, root)
    manifest = read_manifest(made.folder)
    shutil.rmtree(made.folder)
    return manifest


def training_stage(run: RunConfig, materials: Materials, root: Path) -> tuple[RunConfig, Stage]:
    """The stage of a run, named by all that its result depends on, and the run with its start where the
    workers find it."""
    run, named = _resolve_start(run)
    batches_matter = isinstance(run.method, SupConConfig)
    decisive = run.train.decisive(batches_matter=batches_matter)
    stage = Stage(root, f"train-{run.method.type}", train=decisive, method=named, materials=materials.names())
    return run, stage


def _tell(manifest: Mapping[str, Any]) -> None:
    partition, workers = manifest["partition"], manifest["world_size"]
    log.info(
        "ZeRO stage %d in %s, %d workers x %d micro-batches of %d: each holds %d of the %d elements of %s",
        manifest["zero_stage"],
        manifest["precision"],
        workers,
        manifest["micro_batches"],
        manifest["micro_batch"],
        partition["shard_elements"],
        partition["full_elements"],
        partition["parameter"],
    )
    peaks = ", ".join(f"{peak / 2**20:,.0f} MiB" for peak in manifest["peak_host_bytes"])
    log.info(
        "Peak memory of the workers: %s; a checkpoint took %.2f s and %s bytes",
        peaks,
        manifest["checkpoint"]["seconds"],
        f"{manifest['checkpoint']['bytes']:,}",
    )


def _announce(train: TrainConfig, outline: Method) -> None:
    """Say what follows from the settings, before anything is computed."""
    trained, every = _trained(outline), sum(parameter.numel() for parameter in outline.parameters())
    fewest, most = train.worker_range
    for workers in sorted({fewest, most}):
        config = deepspeed_config(train, workers, bf16=False)
        log.info(
            "A step of %d on %d workers is %d micro-batches of at most %d each; ZeRO stage %d, trained %s of "
            "%s parameters",
            train.global_batch,
            workers,
            config["gradient_accumulation_steps"],
            config["train_micro_batch_size_per_gpu"],
            config["zero_optimization"]["stage"],
            f"{trained:,}",
            f"{every:,}",
        )


def _checkpoint_bytes(train: TrainConfig, outline: Method) -> int:
    kept = train.checkpoints.keep_last + train.checkpoints.keep_best
    numbers = 3 if train.ema is None else 4
    return BYTES_OF_A_NUMBER * numbers * _trained(outline) * (kept + 1)


def _trained(method: Method) -> int:
    return sum(parameter.numel() for parameter in method.trainable().values())


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
    """Turn the best checkpoint, or the last where none is measured, into the result; gives what the manifest
    says of the run."""
    method = build_method(load_backbone(materials.backbone), run.method)
    kept = checkpoints_in(work, run.train)
    newest, chosen = kept.newest(), kept.best()
    assert newest is not None and chosen is not None, "training ends with a checkpoint"
    state = load_state(chosen, shapes_of(method))
    last = state if newest == chosen else load_state(newest, shapes_of(method))
    assert last.step == run.train.steps or last.facts.get("stopped"), f"training ended at step {last.step}"
    with torch.no_grad():
        for name, parameter in method.trainable().items():
            moments = state.parameters[name]
            parameter.copy_(moments.value if run.train.ema is None else moments.states[EMA])
    lines = [json.loads(line) for line in (work / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    metrics: dict[str, Any] = {"steps": state.step, "loss_first": losses[0], "loss_last": losses[-1]}
    metrics |= {
        name: state.facts[name]
        for name in ("validation_loss", "skipped")
        if state.facts.get(name) is not None
    }
    method.save(folder / RESULT, about | {"metrics": metrics})
    shutil.copy(work / METRICS_FILE, folder / METRICS_FILE)
    engine: dict[str, Any] = json.loads((work / ENGINE_FILE).read_text(encoding="utf-8"))
    write_training_page(folder / METRICS_FILE, _for_page(run, metrics, engine), folder / PAGE)
    return metrics | engine | {"seconds": last.facts.get("seconds")}


def _for_page(run: RunConfig, metrics: Mapping[str, Any], engine: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("deepspeed", "peak_host_bytes", "checkpoint", "steps")
    told = {name: value for name, value in {**metrics, **engine}.items() if name not in left_out}
    return told | {
        "name": f"{run.method.type} around {run.backbone.path}",
        "steps": run.train.steps,
        "global_batch": run.train.global_batch,
        "peak_memory_bytes": max(engine["peak_host_bytes"]),
        "checkpoint_bytes": engine["checkpoint"]["bytes"],
    }


def _fit(job: Job) -> None:
    for tries_left in reversed(range(1 + job.run.train.max_failures)):
        failure = _try_to_fit(job)
        if failure is None:
            return
        # A mistake comes back at every try; a worker or a machine that was lost need not.
        if not tries_left or find_mistake(failure) is not None:
            raise failure
        log.info("Training broke off (%s) and goes on from its last checkpoint", type(failure).__name__)
        _free_what_is_left()


def _free_what_is_left() -> None:
    """Give back what workers held that could not be started: Ray would keep it until this program ends."""
    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        # An id ends with that of the job that it belongs to.
        if name.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def _try_to_fit(job: Job) -> BaseException | None:
    failures: list[BaseException] = []

    def fit() -> None:
        # The thread that waits looks into what is found here.
        try:
            _trainer(job, ray.get(job.watch.begin.remote())).fit()
        except BaseException as failure:
            failures.append(_explained(failure, job.watch))

    # Ray Train takes Ctrl-C over in the main thread, also for the time after training, and then waits
    # for what it stops; left to Python, Ctrl-C ends this program and with it everything that it started.
    # The main thread only waits meanwhile, so that an interruption never meets it inside Ray's own calls.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    thread.join()
    return failures[0] if failures else None


def _explained(failure: BaseException, watch: Any) -> BaseException:
    """What the watch knows better, or the failure itself."""
    try:
        stall = ray.get(watch.stall.remote())
    except ray.exceptions.RayError:
        return failure
    return failure if stall is None else TrainingError(stall)


def _trainer(job: Job, attempt: int) -> TorchTrainer:
    config = job.run.train
    gpus = config.gpu
    if gpus is None:
        gpus = ray.cluster_resources().get("GPU", 0) >= config.worker_range[0]
    return TorchTrainer(
        train_worker,
        # By reference: Ray's controller would else import all that a job is made of.
        train_loop_config={"job": ray.put(job), "attempt": attempt},
        scaling_config=_scaling(config, gpus=gpus),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=ray.train.RunConfig(name="ray", storage_path=str(job.work)),
    )


def _scaling(config: TrainConfig, *, gpus: bool) -> ScalingConfig:
    workers: Any = config.num_workers
    resources = {"CPU": config.threads_per_worker} | ({"GPU": 1} if gpus else {})
    more: dict[str, Any] = {"use_gpu": gpus, "resources_per_worker": resources}
    if isinstance(workers, ElasticWorkers):
        more |= {"elastic_resize_monitor_interval_s": workers.look_every_seconds}
        workers = config.worker_range
    return ScalingConfig(num_workers=workers, **more)

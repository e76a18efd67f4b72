"""Ray Data: queries fanned out over a pool of models, answers kept, counts summed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import backbone_identity, load_for_inference
from mmicl_core.config.episodes import EpisodeConfig, KindConfig, ShotStage, TaskConfig, TwoWayConfig
from mmicl_core.config.evaluate import ADAPTED, Condition, EvaluateConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.images import decode
from mmicl_core.data.pictures import images_of
from mmicl_core.data.tasks.kind import kinds_of
from mmicl_core.errors import ConfigError
from mmicl_core.evaluation.metrics import names_exactly, names_only, wilson_interval
from mmicl_core.evaluation.naming import NamingTask
from mmicl_core.methods import METHODS, load_method, read_settings
from mmicl_core.methods.adapter import adapter_identity
from mmicl_core.methods.base import Pictures, Plain, episode_turns
from pipelines.episodes import Source, build_episodes, describe, read_episodes
from pipelines.materials import open_backbone
from pipelines.progress import counting
from pipelines.stages import Stage, read_manifest

__all__ = ["evaluate", "evaluation_episodes"]

log = logging.getLogger("mmicl")

PREDICTIONS_FILE = "predictions.parquet"
# Answerers that took every CPU would wait for ever for the tasks that feed them.
CPUS_OF_AN_ANSWERER = 0.5


def evaluate(run: RunConfig, root: Path) -> list[dict[str, Any]]:
    """Ask every condition at every number of shots; one row of results for each number.

    A row holds `shots_per_class`, `part`, `queries`, `conditions` (each `accuracy` with the `low` and
    `high` end of its 95 % interval) and `tokens` (mean of a demonstration, full and as the adapter takes it).
    """
    source = describe(run, root)
    rows = []
    for shots in run.evaluate.shots_per_class:
        episodes = evaluation_episodes(source, run, shots, root)
        rows.append(_evaluate_at(run, shots, source, episodes, root))
    return rows


def evaluation_episodes(source: Source, run: RunConfig, shots: int, root: Path) -> Stage:
    """Episodes of the part asked about, all with hard negatives and the question that training used first."""
    task: TaskConfig = KindConfig(demonstrations=2 * shots)
    if run.evaluate.task == "two_way":
        task = _as_trained(run.episodes.tasks)
    config = EpisodeConfig(
        part=run.evaluate.part,
        stages=(
            ShotStage(
                episodes=run.evaluate.queries,
                min_shots_of_both_classes=2 * shots,
                max_shots_of_both_classes=2 * shots,
            ),
        ),
        tasks=(task,),
        near_duplicate_bits=run.episodes.near_duplicate_bits,
        seed=run.evaluate.seed,
    )
    return build_episodes(source, config, root)


def _as_trained(tasks: Sequence[TaskConfig]) -> TwoWayConfig:
    trained = next((task for task in tasks if isinstance(task, TwoWayConfig)), TwoWayConfig())
    return TwoWayConfig(questions=trained.questions[:1], wording=trained.wording, varied=False)


def _evaluate_at(run: RunConfig, shots: int, source: Source, episodes: Stage, root: Path) -> dict[str, Any]:
    config = run.evaluate
    backbone = open_backbone(run.backbone, source, root)
    adapted = any(condition in ADAPTED for condition in config.conditions)
    adapter = resolve(config.adapter) if config.adapter and adapted else None
    if adapter is not None and "mixed" in config.conditions and read_settings(adapter).type != "aim":
        raise ConfigError(
            "evaluate.conditions ask for 'mixed', fused demonstrations before one written out, but the "
            f"adapter in {adapter} is of method {read_settings(adapter).type!r}, which fuses none: leave it "
            "out"
        )
    stage = Stage(
        root,
        "evaluate",
        episodes=episodes.fingerprint,
        backbone=backbone_identity(backbone),
        adapter=adapter_identity(adapter) if adapter else None,
        conditions=config.conditions,
        max_new_tokens=config.max_new_tokens,
    )

    def build(folder: Path) -> dict[str, Any]:
        rows = [{"row": number} for number in range(read_manifest(episodes.folder)["built"])]
        batches = -(-len(rows) // config.batch)
        title = f"Answering at {shots} shots per class"
        with counting(title, len(rows) * len(config.conditions)) as counter:
            answered = (
                ray.data.from_arrow(pa.Table.from_pylist(rows))
                .repartition(batches)
                .map_batches(
                    _Answerer,
                    batch_size=config.batch,
                    batch_format="pyarrow",
                    fn_constructor_args=(
                        config,
                        backbone,
                        adapter,
                        source,
                        episodes.folder,
                        counter,
                    ),
                    compute=ray.data.ActorPoolStrategy(size=min(config.num_workers, batches)),
                    num_cpus=CPUS_OF_AN_ANSWERER,
                    num_gpus=1 if ray.cluster_resources().get("GPU", 0) >= config.num_workers else 0,
                )
            )
            answers = sorted(answered.take_all(), key=lambda row: (row["episode"], row["condition"]))
        pq.write_table(pa.Table.from_pylist(answers), folder / PREDICTIONS_FILE)
        return {"shots_per_class": shots, "part": config.part} | _sum_up(answers)

    return stage.run(build)


def _sum_up(answers: list[dict[str, Any]]) -> dict[str, Any]:
    conditions: dict[str, Any] = {}
    for condition in sorted({row["condition"] for row in answers}):
        right = [row["right"] for row in answers if row["condition"] == condition]
        low, high = wilson_interval(sum(right), len(right))
        conditions[condition] = {"accuracy": sum(right) / len(right), "low": low, "high": high}
    tokens = {
        f"demonstration_{kind}": sum(row[f"tokens_{kind}"] for row in answers) / len(answers)
        for kind in ("full", "adapted")
    }
    return {"queries": len(answers) // len(conditions), "conditions": conditions, "tokens": tokens}


class _Answerer:
    """One model with its queries; answers a batch under every condition."""

    def __init__(
        self,
        config: EvaluateConfig,
        backbone: Path,
        adapter: Path | None,
        source: Source,
        episodes: Path,
        counter: Any,
    ) -> None:
        torch.set_num_threads(1)
        plain, adapted = Plain(load_for_inference(backbone)), None
        if adapter is not None:
            changes = METHODS[read_settings(adapter).type].changes_backbone
            adapted = load_method(adapter, load_for_inference(backbone) if changes else plain.backbone)
        self._task = NamingTask(plain, adapted, config.max_new_tokens)
        self._methods = {"full": plain, "adapted": adapted or plain}
        self._prepare = plain.backbone.prepare
        self._reader = source.described.corpus.pictures(source.described.pairs.folder)
        self._episodes = read_episodes(episodes)
        concepts = Catalogue(source.catalogue("concept").folder)
        self._known = {
            "true_name": dict(zip(concepts.ids, concepts.names, strict=True)),
            "kind": dict(zip(concepts.ids, kinds_of(concepts), strict=True)),
        }
        self._config, self._counter = config, counter

    def __call__(self, batch: pa.Table) -> pa.Table:
        episodes = [self._episodes[row] for row in batch.column("row").to_pylist()]
        images = images_of(episodes)
        decoded = [decode(self._reader.read(image)) for image in images.values()]
        pictures = dict(zip(images, self._prepare(decoded), strict=True))
        costs = [self._costs(episode, pictures) for episode in episodes]
        rows = []
        for condition in self._config.conditions:
            answers = self._task.answer(episodes, condition, pictures)
            for episode, answer, cost in zip(episodes, answers, costs, strict=True):
                asked = {"episode": episode["episode"], "condition": condition, "answer": answer}
                rows.append(asked | self._scored(episode, condition, answer) | cost)
            ray.get(self._counter.add.remote(len(episodes)))
        return pa.Table.from_pylist(rows)

    def _costs(self, episode: dict[str, Any], pictures: Pictures) -> dict[str, float]:
        """Mean tokens of a demonstration, in full and as the adapter takes it."""
        shown = episode_turns(episode)[:-1]
        return {
            f"tokens_{kind}": sum(method.demonstration_tokens(turn, pictures) for turn in shown) / len(shown)
            for kind, method in self._methods.items()
        }

    def _scored(self, episode: dict[str, Any], condition: Condition, answer: str) -> dict[str, Any]:
        if episode["task"] == "kind":
            right = names_exactly(answer, episode["answer"])
            return {"expected": episode["answer"], "other": episode["other"], "right": right}
        # Its answer may be a sentence.
        other = episode["other"]
        (expected,) = (name for name in episode["names"] if name != other)
        known = self._known.get(condition.removeprefix("adapted_"))
        if known is None:
            return {"expected": expected, "other": other, "right": names_only(answer, expected, other)}
        told = {
            name: known[concept] for name, concept in zip(episode["names"], episode["concepts"], strict=True)
        }
        right = names_exactly(answer, told[expected])
        return {"expected": told[expected], "other": told[other], "right": right}

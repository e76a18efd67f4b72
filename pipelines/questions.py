"""The tasks of an evaluation: those of files as they are, those of the corpus from drawn episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmicl_core.config.episodes import EpisodeConfig, KindConfig, ShotStage, TaskConfig, TwoWayConfig
from mmicl_core.config.evaluation_tasks import KindsConfig, NamingConfig, TaskSettings, TrueNamesConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.pictures import images_of
from mmicl_core.data.wordings import WORDINGS
from mmicl_core.evaluation.cells import TEXT_ONLY
from mmicl_core.evaluation.tasks import FILE_TASKS
from mmicl_core.evaluation.tasks.base import Task
from mmicl_core.evaluation.tasks.corpus import CorpusPictures, KindTask, TrueNameTask, TwoWayTask
from pipelines.episodes import Source, build_episodes, describe, read_episodes
from pipelines.stages import Stage

__all__ = ["OF_CORPUS", "asked_episodes", "open_task"]

OF_CORPUS = (NamingConfig, KindsConfig, TrueNamesConfig)
"""Settings of tasks that ask about the corpus of the run."""
# Two classes have at least a demonstration each.
FEWEST = 2


def open_task(settings: TaskSettings, run: RunConfig, root: Path) -> Task:
    """A task, ready to be read.

    Raises:
        DataError: no episode of the corpus can be drawn.
    """
    if not isinstance(settings, OF_CORPUS):
        return FILE_TASKS[settings.type](settings)
    source = describe(run, root)
    rows = read_episodes(asked_episodes(settings, source, run, root).folder)
    pictures = _pictures(source, rows)
    if isinstance(settings, NamingConfig):
        return TwoWayTask(rows, pictures, WORDINGS[_as_trained(run.episodes.tasks).wording].opening)
    if isinstance(settings, KindsConfig):
        return KindTask(rows, pictures)
    concepts = Catalogue(source.catalogue("concept").folder)
    return TrueNameTask(rows, pictures, dict(zip(concepts.ids, concepts.names, strict=True)))


def asked_episodes(
    settings: NamingConfig | KindsConfig | TrueNamesConfig, source: Source, run: RunConfig, root: Path
) -> Stage:
    """Episodes whose queries are asked: with as many demonstrations as will be asked for at most, all with
    hard negatives and the question that training used first."""
    most = max(run.evaluate.shots)
    if run.evaluate.style == "open_flamingo":
        most = max(most, TEXT_ONLY)
    task: TaskConfig = KindConfig(demonstrations=most)
    if not isinstance(settings, KindsConfig):
        task = _as_trained(run.episodes.tasks)
    shots = max(most + most % 2, FEWEST)
    stage = ShotStage(
        episodes=run.evaluate.queries, min_shots_of_both_classes=shots, max_shots_of_both_classes=shots
    )
    config = EpisodeConfig(
        part=settings.part,
        stages=(stage,),
        tasks=(task,),
        near_duplicate_bits=run.episodes.near_duplicate_bits,
        seed=run.evaluate.seed,
    )
    return build_episodes(source, config, root)


def _as_trained(tasks: Sequence[TaskConfig]) -> TwoWayConfig:
    trained = next((task for task in tasks if isinstance(task, TwoWayConfig)), TwoWayConfig())
    return TwoWayConfig(questions=trained.questions[:1], wording=trained.wording, varied=False)


def _pictures(source: Source, rows: Sequence[Mapping[str, Any]]) -> CorpusPictures:
    reader = source.described.corpus.pictures(source.described.pairs.folder)
    return CorpusPictures(images_of(rows), reader)

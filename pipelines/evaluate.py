"""Evaluation: the same questions and demonstrations to every model, answers kept, scores and a card.

    tasks --lay out--> cells --content--> requests --answers--> predictions --summary--> results, card, page

Whatever was answered before, by this run or another one in the same folder, is not asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import backbone_identity
from mmicl_core.config.evaluate import AskedModel, EvaluateConfig
from mmicl_core.config.evaluation_tasks import TaskSettings
from mmicl_core.config.model import BackboneConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.files import write_atomic
from mmicl_core.errors import ConfigError
from mmicl_core.evaluation.answering import Reply, Request, key_of, request_of
from mmicl_core.evaluation.cells import Cell, Layout, lay_out
from mmicl_core.evaluation.controls import BLANK
from mmicl_core.evaluation.demonstrations import Alike
from mmicl_core.evaluation.summary import Scored, summarise
from mmicl_core.evaluation.tasks.base import Questions
from mmicl_core.methods import read_settings
from mmicl_core.methods.adapter import CONFIG_FILE as ADAPTER_FILE
from mmicl_core.methods.adapter import adapter_identity
from pipelines.answers import AnswerStore, Asked, Batch, ask, measure
from pipelines.cards import CARD_FILES, compression_row, examples, write_card, write_page
from pipelines.environment import endpoint_key
from pipelines.episodes import describe
from pipelines.materials import NEW_NANO, open_backbone
from pipelines.origins import facts_of_run, training_of
from pipelines.progress import counting
from pipelines.questions import open_task
from pipelines.similar import picture_digests, rank_by_similarity
from pipelines.stages import Stage
from pipelines.trainings import Trained

__all__ = ["PREDICTIONS_FILE", "RESULTS_FILE", "evaluate"]

log = logging.getLogger("mmicl")

PREDICTIONS_FILE, RESULTS_FILE = "predictions.parquet", "results.json"
ANSWERS_FILE = "answers.sqlite"
# Of a score between 0 and 1, from here on an example is shown as right.
RIGHT = 0.5


@dataclass(frozen=True)
class _Cells:
    """One task with what each of its cells asks."""

    label: str
    layout: Layout
    requests: tuple[tuple[Request, ...], ...]
    digests: Mapping[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that is asked."""
        keys = [key_of(one, "", self.digests.__getitem__) for cell in self.requests for one in cell]
        return hashlib.sha256("".join(keys).encode()).hexdigest()[:12]

    def keys(self, asked: Asked) -> list[list[str]]:
        """Names of the answers of a model, by cell."""
        return [
            [key_of(one, asked.identity, self.digests.__getitem__) for one in cell] for cell in self.requests
        ]


def evaluate(
    run: RunConfig, root: Path, trained: Mapping[str, Sequence[Trained]] = MappingProxyType({})
) -> dict[str, Any]:
    """Ask all models all tasks; gives what `results.json` holds, with its `folder`.

    `tasks` has a summary of each (`mmicl_core.evaluation.summary`), `models` who was asked and how that was
    trained, `facts` what it takes to do it again.

    Args:
        trained: of each model that a recipe trains, what that left, by seed.

    Raises:
        ConfigError: models and tasks do not fit.
        DataError: files of a task are missing or wrong.
        BackboneError: a model cannot be loaded, or a server does not answer.
    """
    config = run.evaluate
    models = {
        model.name: tuple(_asked(model, run, root, trained.get(model.name, ()))) for model in config.asked
    }
    tasks = [_cells(settings, run, root) for settings in config.tasks]
    stage = Stage(
        root,
        "evaluate",
        tasks=[cells.fingerprint for cells in tasks],
        models=[[name, *(asked.identity for asked in seeds)] for name, seeds in models.items()],
        settings=config.model_dump(mode="json", exclude={"adapter", "models", "num_workers"}),
    )

    def build(folder: Path) -> dict[str, Any]:
        replies = _ask_all(models, tasks, config, AnswerStore(root / ANSWERS_FILE))
        rows, summaries = list[dict[str, Any]](), list[dict[str, Any]]()
        for cells in tasks:
            scores = dict(_scores(models, cells, replies, rows))
            summary = summarise(cells.layout, scores, cells.label, config.seed)
            summaries.append(summary | {"examples": _examples(cells, config.asked[-1].name, rows)})
        pq.write_table(pa.Table.from_pylist(rows), folder / PREDICTIONS_FILE)
        results = {
            "tasks": summaries,
            "models": [
                _about(model, models[model.name], run, trained.get(model.name, ())) for model in config.asked
            ],
            "compression": list(_compression(models, tasks, summaries, config.timed)),
            "facts": facts_of_run(stage.fingerprint),
        }
        write_atomic(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
        write_card(folder, results, _shown_pictures(tasks, summaries))
        write_page(folder, results)
        return {"answers": len(rows)}

    stage.run(build)
    _put_beside_adapters(stage.folder, models)
    results: dict[str, Any] = json.loads((stage.folder / RESULTS_FILE).read_text(encoding="utf-8"))
    return results | {"folder": str(stage.folder)}


def _asked(model: AskedModel, run: RunConfig, root: Path, trained: Sequence[Trained]) -> Iterator[Asked]:
    """A model as it answers, once for each seed."""
    if model.endpoint is not None:
        identity = json.dumps([model.endpoint, model.served_model])
        yield Asked(
            model.name,
            identity,
            endpoint=model.endpoint,
            served_model=model.served_model,
            api_key=endpoint_key(),
        )
        return
    if model.recipe is not None:
        assert trained, f"nobody has trained {model.name!r}: that is for pipelines.compare"
        for one in trained:
            is_adapter = (one.folder / ADAPTER_FILE).is_file()
            yield _local(model, *((_backbone(one.run, root), one.folder) if is_adapter else (one.folder,)))
        return
    if model.backbone is not None:
        run = run.model_copy(update={"backbone": BackboneConfig(path=model.backbone)})
    backbone = _backbone(run, root)
    if model.adapter is None:
        yield _local(model, backbone)
        return
    for place in (model.adapter, *model.seeds):
        yield _local(model, backbone, resolve(place))


def _local(model: AskedModel, backbone: Path, adapter: Path | None = None) -> Asked:
    """A model that is loaded here."""
    about = [backbone_identity(backbone)]
    if adapter is None:
        return Asked(model.name, json.dumps(about), backbone)
    kind = read_settings(adapter).type
    if model.raw and kind != "aim":
        raise ConfigError(
            f"evaluate.models: {model.name!r} has raw {model.raw}, demonstrations written out behind "
            f"fused ones, but the adapter in {adapter} is of method {kind!r}, which fuses none: set raw "
            "to 0"
        )
    identity = json.dumps([*about, adapter_identity(adapter), model.raw])
    return Asked(model.name, identity, backbone, adapter, model.raw)


def _about(
    model: AskedModel, seeds: Sequence[Asked], run: RunConfig, trained: Sequence[Trained]
) -> dict[str, Any]:
    """Who was asked, around which model, and how that is trained."""
    told = model.model_dump(mode="json")
    if model.endpoint is not None:
        return told | {"training": None}
    around = trained[0].run.backbone.path if trained else model.backbone or run.backbone.path
    folders = [asked.adapter or asked.backbone for asked in seeds]
    return told | {
        "backbone": around,
        "train_seeds": [one.run.train.seed for one in trained],
        "training": training_of([folder for folder in folders if folder is not None]),
    }


def _backbone(run: RunConfig, root: Path) -> Path:
    if run.backbone.path != NEW_NANO and run.backbone.vision_tower is None:
        return resolve(run.backbone.path)
    return open_backbone(run.backbone, describe(run, root), root)


def _cells(settings: TaskSettings, run: RunConfig, root: Path) -> _Cells:
    task, label = open_task(settings, run, root), _label(settings)

    def similar(questions: Questions) -> Alike:
        return rank_by_similarity(questions, label, run, root)

    compared = run.evaluate.demonstrations in ("similar", "hard")
    layout = lay_out(task, run.evaluate, similar if compared else None)
    for reason, count in layout.left_out.items():
        log.info("%s: left out %d, as %s", label, count, reason)
    requests = tuple(
        tuple(request_of(task, shown, run.evaluate.style, run.evaluate.beams) for shown in cell.shown)
        for cell in layout.cells
    )
    return _Cells(label, layout, requests, _digests(layout, requests))


def _label(settings: TaskSettings) -> str:
    """What tells a task from others of its type."""
    told = settings.model_dump(mode="json", exclude={"folder"})
    return " ".join([told.pop("type"), *map(str, told.values())])


def _digests(layout: Layout, requests: Sequence[Sequence[Request]]) -> dict[str, str]:
    """SHA-256 of the bytes of every picture that is shown."""
    keys = {
        key.removeprefix(BLANK)
        for cell in requests
        for request in cell
        for turn in request.turns
        for key in turn.pictures
    }
    return picture_digests(sorted(keys), layout.questions.pictures)


def _ask_all(
    models: Mapping[str, Sequence[Asked]],
    tasks: Sequence[_Cells],
    config: EvaluateConfig,
    store: AnswerStore,
) -> dict[str, Reply]:
    sources = [cells.layout.questions.pictures for cells in tasks]
    seen = set[str]()
    batches = [
        batch
        for seeds in models.values()
        for asked in seeds
        for batch in _batches(asked, tasks, config.batch, seen)
    ]
    with counting("Asking", len(seen)) as counter:
        return ask(batches, sources, store, config.num_workers, counter)


def _batches(asked: Asked, tasks: Sequence[_Cells], size: int, seen: set[str]) -> Iterator[Batch]:
    """Prompts of one cell together, as they are of about one length; what was not seen yet, as several cells
    may ask it."""
    for number, cells in enumerate(tasks):
        for keys, requests in zip(cells.keys(asked), cells.requests, strict=True):
            fresh = {key: request for key, request in zip(keys, requests, strict=True) if key not in seen}
            seen.update(fresh)
            pairs = iter(fresh.items())
            while some := dict(islice(pairs, size)):
                yield Batch(asked, number, some)


def _scores(
    models: Mapping[str, Sequence[Asked]],
    cells: _Cells,
    replies: Mapping[str, Reply],
    rows: list[dict[str, Any]],
) -> Iterator[tuple[tuple[str, int, Any], Scored]]:
    """The worth of every cell's answers; what was said goes to `rows`."""
    task = cells.layout.task
    for name, seeds in models.items():
        named = [cells.keys(asked) for asked in seeds]
        for number, cell in enumerate(cells.layout.cells):
            statistics, lengths = [], list[int]()
            for seed, keys in enumerate(named):
                said = [replies[key] for key in keys[number]]
                items = [shown.query for shown in cell.shown]
                scored = task.score_all(items, [reply.prediction for reply in said])
                statistics.append(tuple(scored))
                lengths += [reply.prompt_tokens for reply in said if reply.prompt_tokens is not None]
                about = {"task": cells.label, "model": name, "seed": seed}
                rows += [about | row for row in _predictions(cell, said, scored)]
            mean_length = fmean(lengths) if lengths else None
            yield (name, cell.shots, cell.control), Scored(cell, tuple(statistics), mean_length)


def _examples(cells: _Cells, model: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers of a model's first seed, with the most demonstrations."""
    cell = [cell for cell in cells.layout.cells if cell.control is None][-1]
    said = [
        row
        for row in rows
        if (row["task"], row["model"], row["seed"]) == (cells.label, model, 0)
        and (row["shots"], row["control"]) == (cell.shots, None)
    ]
    scores = [json.loads(row["statistics"]) for row in said]
    right = [score.get("right", next(iter(score.values()))) >= RIGHT for score in scores]
    return list(examples(cell, model, [row["answer"] for row in said], right))


def _shown_pictures(tasks: Sequence[_Cells], summaries: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The pictures of all examples."""
    return {
        key: cells.layout.questions.pictures.read(key)
        for cells, summary in zip(tasks, summaries, strict=True)
        for example in summary["examples"]
        for turn in (*example["demonstrations"], example["query"])
        for key in turn["pictures"]
    }


def _compression(
    models: Mapping[str, Sequence[Asked]],
    tasks: Sequence[_Cells],
    summaries: Sequence[Mapping[str, Any]],
    timed: int,
) -> Iterator[dict[str, Any]]:
    """Score and cost of the first seed of each model, by task and shots."""
    if not timed:
        return
    sources = [cells.layout.questions.pictures for cells in tasks]
    asked = [
        (number, cell.shots, request)
        for number, cells in enumerate(tasks)
        for cell, requests in zip(cells.layout.cells, cells.requests, strict=True)
        if cell.control is None
        for request in requests[:timed]
    ]
    requests = [(number, request) for number, _, request in asked]
    measured = measure([first for first, *_ in models.values()], requests, sources)
    for name, costs in zip(models, measured, strict=True):
        for number, summary in enumerate(summaries):
            (curve,) = (curve for curve in summary["curves"] if curve["model"] == name)
            for point in curve["points"]:
                place = (number, point["shots"])
                mine = [cost for cost, (*at, _) in zip(costs, asked, strict=True) if tuple(at) == place]
                yield compression_row(summary["label"], name, point, mine)


def _put_beside_adapters(folder: Path, models: Mapping[str, Sequence[Asked]]) -> None:
    """Copy the card into the folders of adapters; those that come along with the package stay as they are."""
    package = resolve("embedded:nano").parent
    for asked in (one for seeds in models.values() for one in seeds):
        if asked.adapter is not None and not asked.adapter.resolve().is_relative_to(package):
            for name in CARD_FILES:
                shutil.copy(folder / name, asked.adapter / name)


def _predictions(
    cell: Cell, said: Sequence[Reply], scored: Sequence[Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    for shown, reply, statistics in zip(cell.shown, said, scored, strict=True):
        yield {
            "shots": cell.shots,
            "control": cell.control,
            "question": shown.query.id,
            "group": shown.query.group,
            "demonstrations": [item.id for item in shown.demonstrations],
            "answer": reply.text,
            "expected": list(shown.query.references) or [shown.query.answer],
            "prompt_tokens": reply.prompt_tokens,
            "log_probabilities": json.dumps(dict(reply.log_probabilities)),
            "statistics": json.dumps(dict(statistics)),
        }

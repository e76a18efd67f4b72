"""Ray Data: requests that nobody has answered yet, fanned out over a pool of models; answers kept by content.

    requests by key --known?--> missing, in batches --> pool of answerers --> store

A batch is answered and kept as a whole, and batches are cut from all requests, not from those that are
missing: a run that was killed asks the others in the same company, and gets the same answers to the bit.
"""

from __future__ import annotations

import gc
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from mmicl_core.backbones.hugging_face import load_for_inference
from mmicl_core.evaluation.answering import Answerer, Cost, LocalAnswerer, Reply, Request
from mmicl_core.evaluation.endpoint import EndpointAnswerer
from mmicl_core.evaluation.tasks.base import PictureSource
from mmicl_core.methods import load_method
from mmicl_core.methods.base import Plain
from pipelines.mistakes import carried, raise_carried

__all__ = ["AnswerStore", "Asked", "Batch", "ask", "measure"]

# Answerers that took every CPU would wait for ever for the tasks that feed them.
CPUS_OF_AN_ANSWERER = 0.5
AT_ONCE_IN_SQL = 500


@dataclass(frozen=True)
class Asked:
    """One model that answers; it travels to workers, which build it."""

    name: str
    identity: str
    """Everything that its answers depend on, but for the request."""
    backbone: Path | None = None
    adapter: Path | None = None
    raw: int = 0
    endpoint: str | None = None
    served_model: str | None = None
    api_key: str = field(default="", repr=False)

    def build(self) -> Answerer:
        """Load it, or connect to it."""
        if self.endpoint is not None and self.served_model is not None:
            return EndpointAnswerer(self.endpoint, self.served_model, self.api_key)
        assert self.backbone is not None
        torch.set_num_threads(1)
        backbone = load_for_inference(self.backbone)
        method = load_method(self.adapter, backbone) if self.adapter is not None else Plain(backbone)
        return LocalAnswerer(method, self.raw)


@dataclass(frozen=True)
class Batch:
    """Requests that one model answers side by side."""

    asked: Asked
    source: int
    """Number of the source of their pictures."""
    requests: Mapping[str, Request]
    """By key."""

    def row(self, models: Sequence[Asked]) -> dict[str, Any]:
        """As it travels to a worker that has all models."""
        return {
            "model": models.index(self.asked),
            "source": self.source,
            "keys": list(self.requests),
            "requests": [one.to_json() for one in self.requests.values()],
        }


class AnswerStore:
    """Replies by key, in one SQLite file; only the driver writes it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with self._open() as database:
            database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")

    def known(self, keys: Iterable[str]) -> dict[str, Reply]:
        """Those that were kept."""
        wanted, found = list(dict.fromkeys(keys)), dict[str, Reply]()
        with self._open() as database:
            for start in range(0, len(wanted), AT_ONCE_IN_SQL):
                some = wanted[start : start + AT_ONCE_IN_SQL]
                places = ",".join("?" * len(some))
                rows = database.execute(f"SELECT key, reply FROM replies WHERE key IN ({places})", some)
                found |= {key: Reply(**json.loads(reply)) for key, reply in rows}
        return found

    def keep(self, replies: Mapping[str, Reply]) -> None:
        """All of them, or none."""
        with self._open() as database:
            rows = [(key, json.dumps(vars(reply))) for key, reply in replies.items()]
            database.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=60)) as database, database:
            yield database


def ask(
    batches: Sequence[Batch],
    sources: Sequence[PictureSource],
    store: AnswerStore,
    num_workers: int,
    counter: Any,
) -> dict[str, Reply]:
    """The replies to all requests by key, of which those that are not kept are asked for.

    All models are answered by one pool, as its processes take longer to start than to load a model.

    Args:
        batches: of all models, those of one behind each other.
        counter: told of every reply.
    """
    known = store.known(key for batch in batches for key in batch.requests)
    missing = [batch for batch in batches if not batch.requests.keys() <= known.keys()]
    ray.get(counter.resume.remote(len(known)))
    if missing:
        models = list(dict.fromkeys(batch.asked for batch in missing))
        rows = [batch.row(models) for batch in missing]
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(models, tuple(sources), counter),
            compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(rows))),
            num_cpus=CPUS_OF_AN_ANSWERER,
            num_gpus=_gpus(models, num_workers),
        )
        for block in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            rows_of_block: list[dict[str, Any]] = block.to_pylist()  # type: ignore[union-attr]
            for row in rows_of_block:
                raise_carried(row)
            told = {row["key"]: Reply(**json.loads(row["reply"])) for row in rows_of_block}
            store.keep(told)
            known |= told
    return known


def measure(
    models: Sequence[Asked], requests: Sequence[tuple[int, Request]], sources: Sequence[PictureSource]
) -> list[list[Cost]]:
    """What questions take of each model, one at a time in one process.

    Args:
        requests: each with the number of the source of its pictures.
    """
    timer: Any = ray.remote(_Timer)
    options = {"num_cpus": CPUS_OF_AN_ANSWERER, "num_gpus": _gpus(models, 1)}
    actor = timer.options(**options).remote(list(requests), tuple(sources))
    told: list[list[Cost]] = [ray.get(actor.measure.remote(asked)) for asked in models]
    ray.kill(actor)
    return told


class _Timer:
    """One model with nothing beside it."""

    def __init__(self, requests: Sequence[tuple[int, Request]], sources: Sequence[PictureSource]) -> None:
        self._requests, self._sources, self._models = requests, sources, _OneModel()

    def measure(self, asked: Asked) -> list[Cost]:
        """The first question is asked twice: the first time is that of memory and code that are fetched."""
        answerer = self._models.take(asked)
        for source, request in self._requests[:1]:
            answerer.time(request, self._sources[source])
        return [answerer.time(request, self._sources[source]) for source, request in self._requests]


def _gpus(models: Sequence[Asked], num_workers: int) -> int:
    loaded = any(asked.backbone is not None for asked in models)
    return int(loaded and ray.cluster_resources().get("GPU", 0) >= num_workers)


class _OneModel:
    """The model that was asked last; there may be no room for two."""

    def __init__(self) -> None:
        self._asked: Asked | None = None
        self._answerer: Answerer | None = None

    def take(self, asked: Asked) -> Answerer:
        """Loaded where it is another one."""
        if self._answerer is None or self._asked != asked:
            self._answerer = None
            # Models refer to themselves, and are not gone before this.
            gc.collect()
            self._asked, self._answerer = asked, asked.build()
        return self._answerer


class _Worker:
    """One process that answers batch after batch."""

    def __init__(self, models: Sequence[Asked], sources: Sequence[PictureSource], counter: Any) -> None:
        # Loaded with its first batch, as what is wrong with a model can be carried from there.
        self._models, self._loaded = models, _OneModel()
        self._sources, self._counter = sources, counter

    def __call__(self, rows: pa.Table) -> pa.Table:
        return carried(lambda: self._answers(rows))

    def _answers(self, rows: pa.Table) -> pa.Table:
        (row,) = rows.to_pylist()
        asked = self._models[row["model"]]
        requests = [Request.from_json(line) for line in row["requests"]]
        replies = self._loaded.take(asked).answer(requests, self._sources[row["source"]])
        told = [
            {"key": key, "reply": json.dumps(vars(reply))}
            for key, reply in zip(row["keys"], replies, strict=True)
        ]
        ray.get(self._counter.add.remote(len(told), asked.name))
        return pa.Table.from_pylist(told)

"""Ray Data: requests that nobody has answered yet, fanned out over a pool of models; answers kept by content.

    requests by key --known?--> missing, in batches --> pool of answerers --> store

A batch is answered and kept as a whole, and batches are cut from all requests, not from those that are
missing: a run that was killed asks the others in the same company, and gets the same answers to the bit.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
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

__all__ = ["AnswerStore", "Asked", "ask", "measure"]

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
    asked: Asked,
    batches: Sequence[tuple[int, Mapping[str, Request]]],
    sources: Sequence[PictureSource],
    store: AnswerStore,
    num_workers: int,
    counter: Any,
) -> dict[str, Reply]:
    """The replies to all requests, of which those that are not kept are asked for.

    Args:
        batches: requests by key, each with the number of the source of its pictures.
        counter: told of every reply.
    """
    keys = {key for _, requests in batches for key in requests}
    known = store.known(keys)
    rows = [
        {"source": source, "keys": list(requests), "requests": [one.to_json() for one in requests.values()]}
        for source, requests in batches
        if not requests.keys() <= known.keys()
    ]
    ray.get(counter.resume.remote(len(known)))
    if rows:
        answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(asked, tuple(sources), counter),
            compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(rows))),
            num_cpus=CPUS_OF_AN_ANSWERER,
            num_gpus=_gpus(asked, num_workers),
        )
        for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            rows_of_batch: list[dict[str, Any]] = batch.to_pylist()  # type: ignore[union-attr]
            for row in rows_of_batch:
                raise_carried(row)
            told = {row["key"]: Reply(**json.loads(row["reply"])) for row in rows_of_batch}
            store.keep(told)
            known |= told
    return known


def measure(
    asked: Asked, requests: Sequence[tuple[int, Request]], sources: Sequence[PictureSource]
) -> list[Cost]:
    """What questions take of a model, one at a time in one process.

    Args:
        requests: each with the number of the source of its pictures.
    """
    timer: Any = ray.remote(_Timer)
    options = {"num_cpus": CPUS_OF_AN_ANSWERER, "num_gpus": _gpus(asked, 1)}
    actor = timer.options(**options).remote(asked, tuple(sources))
    told: list[Cost] = ray.get(actor.measure.remote(list(requests)))
    ray.kill(actor)
    return told


class _Timer:
    """One model with nothing beside it."""

    def __init__(self, asked: Asked, sources: Sequence[PictureSource]) -> None:
        self._answerer, self._sources = asked.build(), sources

    def measure(self, requests: Sequence[tuple[int, Request]]) -> list[Cost]:
        """The first question is asked twice: the first time is that of memory and code that are fetched."""
        for source, request in requests[:1]:
            self._answerer.time(request, self._sources[source])
        return [self._answerer.time(request, self._sources[source]) for source, request in requests]


def _gpus(asked: Asked, num_workers: int) -> int:
    return int(asked.backbone is not None and ray.cluster_resources().get("GPU", 0) >= num_workers)


class _Worker:
    """One model that answers batch after batch."""

    def __init__(self, asked: Asked, sources: Sequence[PictureSource], counter: Any) -> None:
        self._asked, self._sources, self._counter = asked, sources, counter

    @cached_property
    def _answerer(self) -> Answerer:
        """Loaded with the first batch, as what is wrong with it can be carried from there."""
        return self._asked.build()

    def __call__(self, rows: pa.Table) -> pa.Table:
        return carried(lambda: self._answers(rows))

    def _answers(self, rows: pa.Table) -> pa.Table:
        told = []
        for row in rows.to_pylist():
            requests = [Request.from_json(line) for line in row["requests"]]
            replies = self._answerer.answer(requests, self._sources[row["source"]])
            told += [
                {"key": key, "reply": json.dumps(vars(reply))}
                for key, reply in zip(row["keys"], replies, strict=True)
            ]
        ray.get(self._counter.add.remote(len(told)))
        return pa.Table.from_pylist(told)

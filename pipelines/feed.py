"""What a worker reads in each step: a function of seed and step, the same on any number of workers.

number of a row --read or draw--> row --version of each picture--> features or pixels --collate--> batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Generic, TypeVar

from mmicl_core.config.run import RunConfig
from mmicl_core.data.augment import vary_turns
from mmicl_core.data.pictures import PixelStore
from mmicl_core.data.store import ArrayStore, PictureStore
from mmicl_core.methods.base import Batch, Method, Pictures
from mmicl_core.training.order import RowOrder, share_of_worker
from mmicl_core.training.step import MicroBatch
from pipelines.episodes import DrawnEpisodes, read_episodes
from pipelines.materials import Materials, training_rows
from pipelines.pairs import open_corpus

__all__ = ["Ahead", "Feed", "open_pictures"]

Made = TypeVar("Made")
COLLATING = Lock()


def open_pictures(
    run: RunConfig, method: Method, materials: Materials, rows: Sequence[Mapping[str, Any]]
) -> Pictures:
    """The pictures of all rows by key, as they were kept, or else as the model takes them."""
    if materials.features is not None:
        return PictureStore(materials.features)
    return _pixel_store(run, method, materials).look(turn for row in rows for turn in row["turns"])


def _pixel_store(run: RunConfig, method: Method, materials: Materials) -> PixelStore:
    reader = open_corpus(run.corpus, run.concepts).pictures(materials.pairs)
    return PixelStore(reader, method.backbone.prepare)


class Feed:
    """The batches of one worker: rows by number, features or pixels by key.

    Args:
        run: what is trained.
        method: lays rows out as batches.
        materials: where rows and features lie, or what streamed rows are drawn from.
    """

    def __init__(self, run: RunConfig, method: Method, materials: Materials) -> None:
        self._method, self._run = method, run
        source = materials.drawn_from
        self._drawn = DrawnEpisodes(source, run.episodes) if source is not None else None
        self._states = ArrayStore(materials.states) if materials.states else None
        self._features = PictureStore(materials.features) if materials.features else None
        self._pixels = _pixel_store(run, method, materials)
        self._rows = self._read_rows(materials)
        # What decides the order of a pass is known of an episode before it is drawn.
        outline = self._rows if self._drawn is None else self._drawn.outline()
        self._order = RowOrder(
            lambda epoch: method.epoch_order(outline, epoch, run.train.seed), run.train.global_batch
        )

    @property
    def looks(self) -> bool:
        """Whether the vision tower runs in every step."""
        return self._features is None and self._method.reads == "episodes"

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """This worker's share of a step."""
        return self._share(self._order.step(step), rank, world_size)

    def once(self, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """This worker's share of all rows, in their own order, each of them once."""
        size = self._run.train.global_batch
        for start in range(0, len(self._rows), size):
            visits = [(number, number) for number in range(start, min(start + size, len(self._rows)))]
            yield self._share(visits, rank, world_size)

    def _share(self, visits: Sequence[tuple[int, int]], rank: int, world_size: int) -> list[MicroBatch]:
        shares = share_of_worker(visits, rank, world_size, self._run.train.micro_batch)
        # Workers keep step with each other: one without a row of its own runs another's, which does not
        # count.
        return [self._micro_batch(share or visits[-1:], counts=bool(share)) for share in shares]

    def _micro_batch(self, visits: Sequence[tuple[int, int]], *, counts: bool) -> MicroBatch:
        rows = [self._row(*visit) for visit in visits]
        names = tuple(str(row.get("id", row.get("picture"))) for row in rows)
        return MicroBatch(self._collate(rows), counts, names)

    @property
    def replaced(self) -> Mapping[str, int]:
        """Streamed episodes that another one stands for, by the reason why."""
        return self._drawn.replaced if self._drawn is not None else {}

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        pictures: Pictures | None = self._features
        if pictures is None:
            # Not known before training, or changed by it: the method makes them, from pixels.
            pictures = self._pixels.look(turn for row in rows for turn in row.get("turns", ()))
        # Tokenizers are not made for two threads at once, and validation does not wait for the next step's
        # data.
        with COLLATING:
            batch: Batch = self._method.collate(rows, pictures, self._states)
        return batch

    def _row(self, number: int, visit: int) -> Mapping[str, Any]:
        row = self._rows[number]
        if self._method.reads == "pictures":
            prepared = self._pixels.look([row])[row["picture"]]
            return row | {"pixels": prepared.inputs["pixel_values"], "visit": visit}
        variants = self._run.train.picture_variants
        return vary_turns(row, visit, variants, query_only=self._states is not None)

    def _read_rows(self, materials: Materials) -> Sequence[dict[str, Any]]:
        if self._drawn is not None:
            return self._drawn
        if materials.episodes is not None:
            return read_episodes(materials.episodes)
        return training_rows(materials.catalogue)


class Ahead(Generic[Made]):
    """Makes what the next step takes while the present one is computed.

    Args:
        make: of the number of a step.
        steps: in the order in which they are taken.
    """

    def __init__(self, make: Callable[[int], Made], steps: range) -> None:
        self._make, self._steps = make, iter(steps)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._next: Future[Made] | None = None
        self._begin()

    def take(self) -> Made:
        """What the next step takes; raises what making it raised."""
        assert self._next is not None, "all steps were taken"
        made = self._next.result()
        self._begin()
        return made

    def close(self) -> None:
        """Make nothing more."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        step = next(self._steps, None)
        self._next = None if step is None else self._thread.submit(self._make, step)

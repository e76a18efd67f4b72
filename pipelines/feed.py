"""What a worker reads in each step: a function of seed and step, the same on any number of workers.

number of a row --read or draw--> row --version of each picture--> features or pixels --collate--> batch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmicl_core.config.run import RunConfig
from mmicl_core.data.augment import vary_turns
from mmicl_core.data.pictures import PixelStore
from mmicl_core.data.store import ArrayStore, PictureStore
from mmicl_core.methods.base import Batch, Method, Pictures
from mmicl_core.training.order import RowOrder, share_of_worker
from pipelines.episodes import DrawnEpisodes, read_episodes
from pipelines.materials import Materials, training_rows
from pipelines.pairs import open_corpus

__all__ = ["Feed", "open_pictures"]


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

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """This worker's share of a step."""
        shares = share_of_worker(self._order.step(step), rank, world_size, self._run.train.micro_batch)
        return [self._collate([self._row(*visit) for visit in share]) for share in shares]

    @property
    def replaced(self) -> Mapping[str, int]:
        """Streamed episodes that another one stands for, by the reason why."""
        return self._drawn.replaced if self._drawn is not None else {}

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        pictures: Pictures | None = self._features
        if pictures is None:
            # Not known before training, or changed by it: the method makes them, from pixels.
            pictures = self._pixels.look(turn for row in rows for turn in row.get("turns", ()))
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

"""A corpus as episodes are drawn from it, made in this process: what the stages do, without their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmicl_core.config.corpus import WebdatasetConfig
from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.data.catalogue import Catalogue, make_bucket, write_bucket
from mmicl_core.data.episodes import draw
from mmicl_core.data.grouping import assign_concepts, catalogued, find_repeats, hashes_of_sides
from mmicl_core.data.look import Looker
from mmicl_core.data.neighbours import NEIGHBOURS, Neighbours
from mmicl_core.data.plans import render
from mmicl_core.data.pool import Catalogues, open_pool
from mmicl_core.data.readers.base import Row
from mmicl_core.data.readers.webdataset import WebdatasetReader
from mmicl_core.data.schema import PAIR
from mmicl_core.data.splits import Split
from mmicl_core.data.storage import Location
from mmicl_core.data.taxonomy import rank_by_taxonomy

__all__ = ["Opened", "drawn_episodes", "open_shards", "read_shards"]

MOST_REPEATS = 16


@dataclass(frozen=True)
class Opened:
    """A corpus of compressed shards."""

    rows: list[Row]
    split: Split
    catalogue: Catalogue
    neighbours: Neighbours
    encoded: Mapping[str, bytes]
    """Encoded pictures by key."""


def read_shards(folder: Path) -> list[Row]:
    """All rows of the webdataset shards of a folder."""
    reader = WebdatasetReader(Location(str(folder)), WebdatasetConfig())
    return [row for unit in reader.units() for row in reader.read(unit)]


def open_shards(folder: Path, work: Path) -> Opened:
    """Read, look, group; `work` takes the catalogue."""
    rows, split = read_shards(folder), Split.load(Location(str(folder)))
    encoded = {row.pair["picture"]: row.encoded or b"" for row in rows}
    # Where they lie is left out: these bytes came out of compressed archives.
    pairs = [
        row.pair | {"image": {"path": row.pair["picture"], "member": "", "offset": 0, "size": 0}}
        for row in rows
    ]
    table = pa.Table.from_pylist(pairs, schema=PAIR)
    looked, _ = Looker(lambda image: encoded[image["path"]], max_pixels=10**6)(table)
    concepts = assign_concepts(table, looked, split, None)
    shown, held = hashes_of_sides(concepts)
    repeats = find_repeats([shown], [held], MOST_REPEATS)
    kept, _ = catalogued(table, looked, concepts, "concept", split, *repeats, file=0)
    pictures, groups, _ = make_bucket(kept, 2)
    write_bucket(work, 0, pictures, groups)
    catalogue = Catalogue(work)
    near, similarity = rank_by_taxonomy(catalogue.groups, 100)
    ranked = {"group": list(range(len(near))), "neighbours": near, "similarity": similarity}
    return Opened(rows, split, catalogue, Neighbours(pa.table(ranked, schema=NEIGHBOURS)), encoded)


def drawn_episodes(opened: Opened, config: EpisodeConfig) -> list[dict[str, Any]]:
    """All episodes of a configuration that can be drawn."""
    pool = open_pool(Catalogues(concept=opened.catalogue), opened.neighbours, config)
    plans = [draw(number, pool, config) for number in range(config.total)]
    return render([plan for plan in plans if not isinstance(plan, str)], pool).to_pylist()

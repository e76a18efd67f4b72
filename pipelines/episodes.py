"""Ray Data: corpus shards -> PAIR rows -> 2-way hard-negative episodes, both as Parquet.

    shards --flat_map(read_shard)--> pairs --index (no pixels)--> pool --map_batches(draw)--> episodes

Pixels stay in the pairs; an episode names its pictures. Episodes are functions of their number, so
any number of workers writes the same ones.
"""

from __future__ import annotations

from collections import Counter as Tally
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import ray

from mmicl_core.config.data import EpisodeConfig
from mmicl_core.data.episodes import Pool, build_pool, draw_episode
from mmicl_core.data.files import file_digest
from mmicl_core.data.pictures import read_metadata
from mmicl_core.data.schema import EPISODE, PAIR
from mmicl_core.data.sources import find_shards, read_shard
from mmicl_core.data.splits import Split
from mmicl_core.errors import DataError
from pipelines.progress import counting
from pipelines.stages import Stage

__all__ = ["build_episodes", "corpus_counts", "read_episodes", "read_pairs"]

EPISODES_PER_TASK = 256
SKIPPED = pa.field("skipped", pa.string())


def read_pairs(corpus: Path, root: Path) -> Stage:
    """Read a corpus once. The manifest counts `read`, `kept` and `skipped_by_reason`."""
    shards = find_shards(corpus)
    # By content: a checkout that travels to a cluster keeps neither places nor times.
    digests = {shard.name: file_digest(shard) for shard in shards}
    split = Split.load(corpus)
    stage = Stage(root, "pairs", shards=digests, split=split.plain())

    def build(folder: Path) -> dict[str, Any]:
        with counting("Reading the corpus", len(shards)) as counter:
            paths = ray.data.from_items([{"path": str(shard)} for shard in shards])
            read = partial(_read, counter=counter)
            paths.map_batches(read, batch_size=1, batch_format="pyarrow").write_parquet(str(folder))
        skipped = _skipped_by_reason(folder)
        rows = read_metadata(folder)
        split.check({row["concept"] for row in rows}, {row["style"] for row in rows})
        kept = [row["picture"] for row in rows]
        twice = next((one for one, other in pairwise(kept) if one == other), None)
        if twice is not None:
            raise DataError(f"two shards of {corpus} hold a sample {twice!r}: rename one, keys are unique")
        return {"read": len(kept) + sum(skipped.values()), "kept": len(kept), "skipped_by_reason": skipped}

    stage.run(build)
    return stage


def corpus_counts(pairs: Stage, split: Split) -> dict[str, int]:
    """Images, concepts and held-out concepts of a corpus."""
    rows = read_metadata(pairs.folder)
    concepts = {row["concept"] for row in rows}
    return {
        "images": len(rows),
        "concepts": len(concepts),
        "held_out_concepts": len(concepts & split.held_out_concepts),
    }


def build_episodes(pairs: Stage, split: Split, config: EpisodeConfig, root: Path) -> Stage:
    """Draw episodes. The manifest counts `built` and `skipped_by_reason`."""
    stage = Stage(
        root,
        "episodes",
        pairs=pairs.fingerprint,
        config=config,
    )

    def build(folder: Path) -> dict[str, Any]:
        metadata = read_metadata(pairs.folder)
        pool = build_pool(metadata, split, config.part, config.neighbours)
        with counting(f"Drawing {config.part.replace('_', ' ')} episodes", config.total) as counter:
            draw = partial(_draw, pool=ray.put(pool), config=config, counter=counter)
            ray.data.range(config.total).map_batches(
                draw, batch_size=EPISODES_PER_TASK, batch_format="pyarrow"
            ).write_parquet(str(folder))
        skipped = _skipped_by_reason(folder)
        built = config.total - sum(skipped.values())
        if not built:
            raise DataError(f"no episode could be drawn from {pairs.folder}: {skipped}")
        return {"built": built, "skipped_by_reason": skipped}

    stage.run(build)
    return stage


def read_episodes(folder: Path) -> list[dict[str, Any]]:
    """The EPISODE rows of a finished stage, in the order of their numbers."""
    table = pq.read_table(folder)
    table = table.filter(pa.compute.is_null(table.column("skipped"))).drop_columns(["skipped"])
    rows: list[dict[str, Any]] = table.sort_by("episode").to_pylist()
    return rows


def _read(batch: pa.Table, counter: Any) -> pa.Table:
    rows = [row for path in batch.column("path").to_pylist() for row in read_shard(Path(path))]
    ray.get(counter.add.remote(batch.num_rows))
    return pa.Table.from_pylist(rows, schema=PAIR.append(SKIPPED))


def _skipped_by_reason(folder: Path) -> dict[str, int]:
    reasons = pq.read_table(folder, columns=["skipped"]).column("skipped").to_pylist()
    return dict(Tally(reason for reason in reasons if reason is not None))


def _draw(batch: pa.Table, pool: Any, config: EpisodeConfig, counter: Any) -> pa.Table:
    shared: Pool = ray.get(pool)
    rows = []
    for number in batch.column("id").to_pylist():
        drawn = draw_episode(number, shared, config)
        nothing: dict[str, Any] = dict.fromkeys(EPISODE.names) | {"episode": number, "skipped": drawn}
        rows.append(nothing if isinstance(drawn, str) else drawn | {"skipped": None})
    ray.get(counter.add.remote(len(rows)))
    return pa.Table.from_pylist(rows, schema=EPISODE.append(SKIPPED))

"""Ray Data: catalogues of pictures -> episodes, as Parquet or straight into whoever reads them.

    corpus -> pairs -> looks -> concepts -> catalogues, neighbours --draw--> episodes

An episode is a function of (seed, number) and of the catalogues. So parts are made by any number of
workers, and one episode can be drawn again by its id alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from mmicl_core.assets import resolve
from mmicl_core.config.corpus import ConceptConfig, EmbedderConfig, NeighbourConfig
from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.episodes import draw, shots_of
from mmicl_core.data.grouping import Grouping
from mmicl_core.data.neighbours import Neighbours
from mmicl_core.data.plans import render
from mmicl_core.data.pool import Catalogues, Pool, needed_groupings, open_pool
from mmicl_core.data.prototypes import gather_embeddings
from mmicl_core.data.schema import EPISODE
from mmicl_core.errors import DataError
from pipelines.catalogue import Described, assign, build_catalogue
from pipelines.neighbours import find_neighbours
from pipelines.pairs import look_at_pairs, open_corpus, read_embedding_files, read_pairs
from pipelines.parts import Counts, run_parts
from pipelines.stages import Stage, read_manifest

__all__ = [
    "DrawnEpisodes",
    "PoolFolders",
    "Source",
    "build_episodes",
    "corpus_counts",
    "describe",
    "episodes_stage",
    "pool_folders",
    "read_episodes",
    "redraw",
    "stream_episodes",
]

SKIPPED_EPISODE = pa.schema([("episode", pa.int64()), ("skipped", pa.string())])


@dataclass(frozen=True)
class Source:
    """A described corpus and the stages that episodes are drawn from, made when first asked for."""

    described: Described
    concepts: ConceptConfig
    neighbours: NeighbourConfig
    embedder: EmbedderConfig | None
    backbone: Path
    root: Path

    def catalogue(self, grouping: Grouping) -> Stage:
        """The pictures of the corpus in groups."""
        return build_catalogue(self.described, grouping, self.concepts.min_pictures, self.root)

    def neighbour_concepts(self) -> Stage:
        """Which concepts stand near which."""
        return find_neighbours(
            self.catalogue("concept"),
            self.described.looked,
            self.neighbours,
            self.embedder,
            self.backbone,
            self.root,
        )


@dataclass(frozen=True)
class PoolFolders:
    """Where a pool of pictures lies; it travels to workers, which open it."""

    catalogues: tuple[tuple[Grouping, Path], ...]
    neighbours: Path | None
    looked: Path

    @property
    def names(self) -> list[str]:
        """What is drawn from, wherever it lies: folder names end in fingerprints."""
        folders = [folder for _, folder in self.catalogues] + ([self.neighbours] if self.neighbours else [])
        return [folder.name for folder in folders]


def describe(run: RunConfig, root: Path) -> Source:
    """Read a corpus, look at it and say what it shows; whatever is there is reused."""
    corpus = open_corpus(run.corpus, run.concepts)
    backbone = resolve(run.backbone.path) if run.embedder is not None else Path()
    pairs = read_pairs(corpus, root)
    looked = look_at_pairs(corpus, pairs, run.embedder, backbone, root)
    described = assign(corpus, pairs, looked, run.concepts, root)
    return Source(described, run.concepts, run.neighbours, run.embedder, backbone, root)


def corpus_counts(concepts: Stage) -> dict[str, int]:
    """Images, concepts and held-out concepts of a catalogue of concepts."""
    manifest = read_manifest(concepts.folder)
    names = {"images": "kept", "concepts": "groups", "held_out_concepts": "held_out"}
    return {name: manifest[count] for name, count in names.items()}


def build_episodes(source: Source, config: EpisodeConfig, root: Path) -> Stage:
    """Draw episodes. The manifest counts `read`, `built`, `turns` and `skipped_by_reason`.

    Raises:
        DataError: not one could be drawn.
    """
    folders, stage = pool_folders(source, config), episodes_stage(source, config, root)
    size = config.episodes_per_file
    parts = [
        {"name": f"{number:05d}", "start": start, "size": min(size, config.total - start)}
        for number, start in enumerate(range(0, config.total, size))
    ]
    run_parts(
        stage,
        parts,
        partial(_draw_part, folders=folders, config=config),
        title=f"Drawing {config.part.replace('_', ' ')} episodes",
        total=config.total,
        check=partial(_check_some, where=source.described.corpus.config.path),
    )
    return stage


def episodes_stage(source: Source, config: EpisodeConfig, root: Path) -> Stage:
    """What `build_episodes` makes, whether it is there or not."""
    return Stage(
        root,
        "episodes",
        made_of=pool_folders(source, config).names,
        config=config.model_dump(mode="json", exclude={"preset", "count", "streamed"}),
    )


def stream_episodes(source: Source, config: EpisodeConfig) -> ray.data.Dataset:
    """The same episodes as EPISODE rows of a Ray dataset, drawn when they are read and written nowhere.

    Numbers that cannot be drawn are left out; `build_episodes` counts them.
    """
    folders = pool_folders(source, config)
    draw_batch = partial(_draw_batch, folders=folders, config=config)
    return ray.data.range(config.total).map_batches(
        draw_batch, batch_size=config.episodes_per_file, batch_format="pyarrow"
    )


def redraw(source: Source, config: EpisodeConfig, number: int) -> dict[str, Any]:
    """Episode `number` once more, from nothing but its number.

    Raises:
        DataError: it is one of those that cannot be drawn.
    """
    table, reasons = _draw([number], pool_folders(source, config), config)
    if reasons:
        raise DataError(f"episode {config.seed}-{number} cannot be drawn: {reasons[0][1]}")
    return dict(table.to_pylist()[0])


class DrawnEpisodes(Sequence[dict[str, Any]]):
    """The episodes of a configuration, each drawn when it is read.

    In place of a number that cannot be drawn stands the next one that can; `replaced` counts these by reason.
    """

    def __init__(self, folders: PoolFolders, config: EpisodeConfig) -> None:
        self._folders, self._config = folders, config
        self.replaced: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._config.total

    def __getitem__(self, number: Any) -> Any:
        for ahead in range(len(self)):
            drawn, reasons = _draw([(number + ahead) % len(self)], self._folders, self._config)
            if not reasons:
                return drawn.to_pylist()[0]
            self.replaced[reasons[0][1]] += 1
        raise DataError(f"not one of {len(self)} episodes can be drawn: {dict(self.replaced)}")

    def outline(self) -> list[dict[str, Any]]:
        """Of each episode what is known without drawing it."""
        return [{"shots_of_both_classes": shots_of(n, self._config)} for n in range(len(self))]


def read_episodes(folder: Path) -> list[dict[str, Any]]:
    """The EPISODE rows of a finished stage, in the order of their numbers."""
    tables = [pq.read_table(file) for file in sorted(folder.glob("episodes-*.parquet"))]
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist() if tables else []
    return rows


def pool_folders(source: Source, config: EpisodeConfig) -> PoolFolders:
    """Where the episodes of `config` are drawn from; what is not there yet is made."""
    stages = {grouping: source.catalogue(grouping) for grouping in needed_groupings(config)}
    neighbours = source.neighbour_concepts() if "concept" in stages else None
    return PoolFolders(
        tuple((grouping, stage.folder) for grouping, stage in stages.items()),
        neighbours.folder if neighbours else None,
        source.described.looked.folder,
    )


@lru_cache(maxsize=4)
def _open(folders: PoolFolders, config: EpisodeConfig) -> Pool:
    opened = {grouping: Catalogue(folder) for grouping, folder in folders.catalogues}
    neighbours = Neighbours.open(folders.neighbours) if folders.neighbours else None
    embed = None
    if "task" in opened:
        files = read_embedding_files(folders.looked)
        embed = partial(gather_embeddings, opened["task"], files=files) if files else None
    return open_pool(Catalogues(**opened), neighbours, config, embed)


def _draw(
    numbers: Iterable[int], folders: PoolFolders, config: EpisodeConfig
) -> tuple[pa.Table, list[tuple[int, str]]]:
    pool = _open(folders, config)
    plans, reasons = [], []
    for number in numbers:
        drawn = draw(number, pool, config)
        if isinstance(drawn, str):
            reasons.append((number, drawn))
        else:
            plans.append(drawn)
    return render(plans, pool), reasons


def _draw_batch(batch: pa.Table, *, folders: PoolFolders, config: EpisodeConfig) -> pa.Table:
    return _draw(batch.column("id").to_pylist(), folders, config)[0]


def _draw_part(
    part: Mapping[str, Any], folder: Path, *, folders: PoolFolders, config: EpisodeConfig
) -> tuple[dict[str, int], Counts]:
    numbers = range(part["start"], part["start"] + part["size"])
    episodes, reasons = _draw(numbers, folders, config)
    files = {f"episodes-{part['name']}.parquet": episodes.num_rows}
    pq.write_table(episodes.cast(EPISODE), folder / f"episodes-{part['name']}.parquet")
    if reasons:
        left_out = pa.Table.from_pylist(
            [{"episode": number, "skipped": reason} for number, reason in reasons], schema=SKIPPED_EPISODE
        )
        pq.write_table(left_out, folder / f"skipped-{part['name']}.parquet")
        files[f"skipped-{part['name']}.parquet"] = len(reasons)
    tally = dict(Counter(reason for _, reason in reasons))
    turns = int(pc.sum(pc.list_value_length(episodes.column("turns"))).as_py() or 0)
    counts = {"read": len(numbers), "built": episodes.num_rows, "turns": turns, "skipped_by_reason": tally}
    return files, counts


def _check_some(counts: Counts, *, where: str) -> None:
    if counts.get("complete") and not counts.get("built"):
        reasons = ", ".join(f"{count} x {why}" for why, count in counts["skipped_by_reason"].items())
        raise DataError(f"no episode could be drawn from {where}: {reasons}")

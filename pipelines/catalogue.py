"""Ray Data: looked-at pairs -> concepts -> a catalogue of pictures in groups.

    pairs + looks --assign--> concepts --find--> pictures met too often, or on both sides
                                      --split by bucket--> buckets --sort, count--> catalogue

The way from files to buckets is by files too: every file of pairs gives one Arrow file with a batch for
each bucket, and whoever makes a bucket reads one batch of each. Nothing passes through the driver, and a
kill loses only the part that was being made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from mmicl_core.config.corpus import ConceptConfig
from mmicl_core.data.arrow_files import read_arrow, write_arrow
from mmicl_core.data.catalogue import make_bucket, write_bucket
from mmicl_core.data.concepts import Clusters, HeadNouns, is_in_sample
from mmicl_core.data.exchange import read_exchange, write_exchange
from mmicl_core.data.grouping import (
    Grouping,
    assign_concepts,
    catalogued,
    find_repeats,
    hashes_of_sides,
    in_range,
)
from mmicl_core.data.schema import SKIPPED
from pipelines.pairs import Corpus, read_embedding_files
from pipelines.parts import Counts, finish_parts, make_parts, reuse_finished
from pipelines.stages import Stage, read_manifest

__all__ = ["Described", "assign", "build_catalogue"]

ROWS_OF_A_BUCKET = 65_536
HASHES_OF_A_RANGE = 4_000_000
PAIR_COLUMNS = (
    "picture",
    "image",
    "text",
    "turns",
    "task",
    "document",
    "position",
    "concept",
    "name",
    "keywords",
    "category",
    "subcategory",
    "style",
)


@dataclass(frozen=True)
class Described:
    """The stages that say all there is to know of each pair: what it is, how it looks, what it shows."""

    corpus: Corpus
    pairs: Stage
    looked: Stage
    concepts: Stage

    @property
    def parts(self) -> list[str]:
        """The names of the files of pairs, in order."""
        files = read_manifest(self.pairs.folder)["files"]
        return sorted(name[len("pairs-") : -len(".parquet")] for name in files if name.startswith("pairs-"))


def assign(corpus: Corpus, pairs: Stage, looked: Stage, config: ConceptConfig, root: Path) -> Described:
    """Say of each pair what it shows, and of the corpus which pictures it repeats.

    Raises:
        DataError: the split holds out what the corpus does not have.
    """
    clusters = _fit_clusters(pairs, looked, config, root) if config.by == "clusters" else None
    stage = Stage(
        root,
        "concepts",
        looked=looked.fingerprint,
        by=config.by,
        # Another version of a parser may find other nouns.
        parser=HeadNouns.cached(config.spacy_pipeline).identity if config.by == "head_noun" else None,
        clusters=clusters.fingerprint if clusters else None,
        split=corpus.split.plain(),
        max_repeats=corpus.config.max_repeats,
    )
    described = Described(corpus, pairs, looked, stage)
    if reuse_finished(stage):
        return described
    names = described.parts
    rows = read_manifest(looked.folder)["read"]
    parts = [{"name": name, "size": 1} for name in names]
    fit = clusters.folder if clusters else None
    work = partial(_assign_part, described=described, config=config, clusters=fit)
    folder = make_parts(stage, parts, work, title="Finding concepts", total=len(parts))
    count = -(-rows // HASHES_OF_A_RANGE) or 1
    ranges = [{"name": f"range-{n:05d}", "number": n, "count": count, "size": 1} for n in range(count)]
    find = partial(_find_repeats, partial_folder=folder, names=names, most=corpus.config.max_repeats)
    make_parts(stage, ranges, find, title="Finding repeated pictures", total=count)
    finish_parts(stage, [*parts, *ranges], summarise=partial(_check_split, corpus=corpus))
    return described


def build_catalogue(described: Described, grouping: Grouping, min_pictures: int, root: Path) -> Stage:
    """Sort the pictures into groups. The manifest counts `read`, `kept`, `skipped` by reason, `groups`."""
    # Documents and tasks have no pictures too few to tell them apart by.
    least = min_pictures if grouping == "concept" else 1
    stage = Stage(root, f"catalogue-{grouping}", concepts=described.concepts.fingerprint, min_pictures=least)
    if reuse_finished(stage):
        return stage
    names, rows = described.parts, read_manifest(described.looked.folder)["kept"]
    buckets = -(-rows // ROWS_OF_A_BUCKET) or 1
    numbered = [{"name": f"exchange-{name}", "file": n, "size": 1} for n, name in enumerate(names)]
    give = partial(_give_part, described=described, names=names, grouping=grouping, buckets=buckets)
    folder = make_parts(stage, numbered, give, title=f"Sorting by {grouping}", total=len(names))
    parts = [{"name": f"bucket-{n:05d}", "number": n, "size": 1} for n in range(buckets)]
    take = partial(_take_part, partial_folder=folder, names=names, min_pictures=least)
    make_parts(stage, parts, take, title=f"Gathering {grouping}s", total=buckets)
    finish_parts(stage, [*numbered, *parts], drop="exchange-*.arrow", summarise=_add_up)
    return stage


def _fit_clusters(pairs: Stage, looked: Stage, config: ConceptConfig, root: Path) -> Stage:
    stage = Stage(root, "clusters", looked=looked.fingerprint, count=config.clusters, seed=config.seed)

    def build(folder: Path) -> dict[str, Any]:
        fit = ray.remote(_fit).options(num_cpus=1)
        counts: dict[str, Any] = ray.get(fit.remote(looked.folder, folder, config))
        return counts

    stage.run(build)
    return stage


def _fit(looked: Path, folder: Path, config: ConceptConfig) -> dict[str, Any]:
    total = read_manifest(looked)["read"]
    chosen = []
    for file, vectors in zip(
        sorted(looked.glob("looked-*.arrow")), read_embedding_files(looked), strict=True
    ):
        table = read_arrow(file)
        keys, usable = table.column("picture").to_pylist(), pc.is_null(table.column("skipped")).to_pylist()
        rows = [
            row
            for row, key in enumerate(keys)
            if usable[row] and is_in_sample(key, total, config.clusters, config.seed)
        ]
        chosen.append(np.asarray(vectors[rows], dtype=np.float32))
    Clusters.fit(np.concatenate(chosen), config.clusters, config.seed).save(folder / "clusters.npy")
    return {"clusters": config.clusters, "sample": sum(map(len, chosen))}


def _assign_part(
    part: Mapping[str, Any],
    folder: Path,
    *,
    described: Described,
    config: ConceptConfig,
    clusters: Path | None,
) -> tuple[dict[str, int], Counts]:
    name = part["name"]
    columns = ["picture", "text", "concept", "name", "style"]
    pairs = pq.read_table(described.pairs.folder / f"pairs-{name}.parquet", columns=columns)
    looked = read_arrow(described.looked.folder / f"looked-{name}.arrow")
    namer = None
    if config.by == "head_noun":
        namer = partial(_head_nouns, nouns=HeadNouns.cached(config.spacy_pipeline))
    elif clusters is not None:
        vectors = np.load(described.looked.folder / f"embedded-{name}.npy", mmap_mode="r")
        namer = partial(_clusters, vectors=vectors, clusters=Clusters.load(clusters / "clusters.npy"))
    split = described.corpus.split
    concepts = assign_concepts(pairs, looked, split, namer)
    write_arrow(folder / f"concepts-{name}.arrow", concepts)
    shown, held = hashes_of_sides(concepts)
    np.save(folder / f"shown-{name}.npy", shown)
    np.save(folder / f"held-{name}.npy", held)
    met = set(concepts.column("concept").to_pylist()) & split.held_out_concepts
    styles = set(pairs.column("style").to_pylist()) & {split.held_out_style}
    counts = {
        "read": concepts.num_rows,
        "held_out_concepts": dict.fromkeys(sorted(met), 1),
        "held_out_styles": dict.fromkeys(sorted(filter(None, styles)), 1),
    }
    files = {
        f"concepts-{name}.arrow": concepts.num_rows,
        f"shown-{name}.npy": len(shown),
        f"held-{name}.npy": len(held),
    }
    return files, counts


def _head_nouns(pairs: pa.Table, *, nouns: HeadNouns) -> Sequence[str | None]:
    texts = pairs.column("text").to_pylist()
    return list(nouns([text or "" for text in texts]))


def _clusters(pairs: pa.Table, *, vectors: Any, clusters: Clusters) -> Sequence[str | None]:
    assigned = clusters.assign(np.asarray(vectors, dtype=np.float32))
    # What could not be embedded is all zeros, and near nothing.
    embedded = np.any(np.asarray(vectors) != 0, axis=1)
    return [
        f"cluster-{number:05d}" if there else None for number, there in zip(assigned, embedded, strict=True)
    ]


def _find_repeats(
    part: Mapping[str, Any], folder: Path, *, partial_folder: Path, names: Sequence[str], most: int
) -> tuple[dict[str, int], Counts]:
    sides = []
    for side in ("shown", "held"):
        files = (np.load(partial_folder / f"{side}-{name}.npy", mmap_mode="r") for name in names)
        sides.append([np.array(in_range(hashes, part["number"], part["count"])) for hashes in files])
    placeholders, twins = find_repeats(sides[0], sides[1], most)
    found = {f"placeholders-{part['number']:05d}.npy": placeholders, f"twins-{part['number']:05d}.npy": twins}
    for name, hashes in found.items():
        np.save(folder / name, hashes)
    return {name: len(hashes) for name, hashes in found.items()}, {}


def _check_split(counts: Counts, *, corpus: Corpus) -> Counts:
    concepts, styles = (counts.pop(name, {}) for name in ("held_out_concepts", "held_out_styles"))
    corpus.split.check(concepts.keys(), styles.keys())
    return counts


def _give_part(
    part: Mapping[str, Any],
    folder: Path,
    *,
    described: Described,
    names: Sequence[str],
    grouping: Grouping,
    buckets: int,
) -> tuple[dict[str, int], Counts]:
    name = names[part["file"]]
    pairs = pq.read_table(described.pairs.folder / f"pairs-{name}.parquet", columns=list(PAIR_COLUMNS))
    looked = read_arrow(described.looked.folder / f"looked-{name}.arrow")
    concepts = read_arrow(described.concepts.folder / f"concepts-{name}.arrow")
    placeholders = _read_hashes(described.concepts.folder, "placeholders")
    twins = _read_hashes(described.concepts.folder, "twins")
    split = described.corpus.split
    rows, left_out = catalogued(pairs, looked, concepts, grouping, split, placeholders, twins, part["file"])
    write_exchange(folder / f"exchange-{name}.arrow", rows, buckets, "group")
    files, counts = _aside(left_out, folder, part["name"])
    files[f"exchange-{name}.arrow"] = rows.num_rows
    return files, counts | {"read": rows.num_rows + left_out.num_rows}


def _take_part(
    part: Mapping[str, Any], folder: Path, *, partial_folder: Path, names: Sequence[str], min_pictures: int
) -> tuple[dict[str, int], Counts]:
    rows = read_exchange([partial_folder / f"exchange-{name}.arrow" for name in names], part["number"])
    pictures, groups, left_out = make_bucket(rows, min_pictures)
    write_bucket(folder, part["number"], pictures, groups)
    files, counts = _aside(left_out, folder, part["name"])
    files |= {
        f"pictures-{part['number']:05d}.arrow": pictures.num_rows,
        f"groups-{part['number']:05d}.arrow": groups.num_rows,
    }
    held_out = int(pc.sum(groups.column("held_out").cast(pa.int64())).as_py() or 0)
    return files, counts | {"kept": pictures.num_rows, "groups": groups.num_rows, "held_out": held_out}


def _aside(left_out: pa.Table, folder: Path, name: str) -> tuple[dict[str, int], Counts]:
    reasons = pc.value_counts(left_out.column("skipped")).to_pylist()
    counts = {"skipped": {row["values"]: row["counts"] for row in reasons}}
    if not left_out.num_rows:
        return {}, counts
    file = f"skipped-{name}.parquet"
    pq.write_table(left_out.cast(SKIPPED), folder / file)
    return {file: left_out.num_rows}, counts


def _add_up(counts: Counts) -> Counts:
    assert counts["read"] == counts["kept"] + sum(counts["skipped"].values()), counts
    return counts


def _read_hashes(folder: Path, kind: str) -> np.ndarray[Any, Any]:
    return np.concatenate([np.load(file) for file in sorted(folder.glob(f"{kind}-*.npy"))])

"""Ray Data: any corpus -> PAIR rows, and one look at every picture.

    files --read--> pairs (text, and where the bytes lie) --look--> SHA-256, perceptual hash, embedding

Both stages are made of parts, one for each file, and neither sends a byte of a picture through Ray: the
process that reads it also decodes and embeds it. Counts add up: read = kept + the sum of the reasons.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray

from mmicl_core.assets import EMBEDDED, resolve
from mmicl_core.config.corpus import ConceptConfig, CorpusConfig, EmbedderConfig
from mmicl_core.data import reasons
from mmicl_core.data.arrow_files import write_arrow
from mmicl_core.data.ingest import write_pairs
from mmicl_core.data.look import LOOKED_AT, Looker
from mmicl_core.data.readers import build_reader
from mmicl_core.data.readers.base import Unit
from mmicl_core.data.splits import Split
from mmicl_core.data.storage import COPY, CORPUS, IMAGES, Location, PictureReader, locate
from mmicl_core.errors import DataError
from pipelines.parts import Counts, Pool, add_counts, run_parts
from pipelines.stages import Stage, read_manifest

__all__ = [
    "Corpus",
    "look_at_pairs",
    "look_at_part",
    "open_corpus",
    "read_embedding_files",
    "read_pairs",
]

CHECKED_AFTER = 10_000
NOTHING_SEEN: Counts = {"read": 0, "kept": 0, "skipped": {}, "remarks": {}}


@dataclass(frozen=True)
class Corpus:
    """A corpus that has been found: where its files lie and what of it is held out."""

    config: CorpusConfig
    location: Location
    images: Location | None
    split: Split

    def pictures(self, pairs: Path) -> PictureReader:
        """Reads the pictures of its pairs, which lie in the folder `pairs`."""
        places = {CORPUS: self.location, COPY: Location(str(pairs))}
        return PictureReader(places | ({IMAGES: self.images} if self.images else {}))


def open_corpus(config: CorpusConfig, concepts: ConceptConfig) -> Corpus:
    """Find the files and the split of a corpus.

    Raises:
        DataError: it does not exist, or its `split.json` is wrong.
    """
    location, images = _locate(config.path), _locate(config.images) if config.images else None
    split = Split.load(location, concepts.held_out_share, concepts.seed)
    return Corpus(config, location, images, split)


def read_pairs(corpus: Corpus, root: Path) -> Stage:
    """Read the files of a corpus. The manifest counts `read`, `kept` and `skipped` by reason."""
    reader = build_reader(corpus.location, corpus.config, corpus.images)
    units = reader.units()
    # Where the limits of a run lie decides nothing about what a row holds.
    settings = corpus.config.model_dump(
        mode="json", exclude={"path", "images", "identity", "max_skipped_share", "max_repeats", "max_pixels"}
    )
    stage = Stage(root, "pairs", files=_identity(corpus, units), settings=settings)
    parts = [{"name": f"{n:05d}", "unit": asdict(unit), "size": 1} for n, unit in enumerate(units)]
    run_parts(
        stage,
        parts,
        partial(_read_part, corpus=corpus),
        title="Reading the corpus",
        total=len(parts),
        check=partial(_check_share, most=corpus.config.max_skipped_share, where=corpus.config.path),
    )
    return stage


def look_at_pairs(
    corpus: Corpus, pairs: Stage, embedder: EmbedderConfig | None, backbone: Path, root: Path
) -> Stage:
    """Look at every picture. The manifest counts `read`, `kept`, `skipped` by reason, and `remarks`."""
    identity = None
    if embedder is not None:
        from mmicl_core.embedders import embedder_identity

        identity = embedder_identity(embedder, backbone)
    stage = Stage(
        root, "looked", pairs=pairs.fingerprint, max_pixels=corpus.config.max_pixels, embedder=identity
    )
    files = read_manifest(pairs.folder)["files"]
    parts = [
        {"name": name[len("pairs-") : -len(".parquet")], "file": name, "size": about["rows"]}
        for name, about in files.items()
        if name.startswith("pairs-")
    ]
    look: Any = partial(look_at_part, corpus=corpus, pairs=pairs.folder)
    if embedder is not None:
        look = Pool(_EmbeddingLook, (corpus, pairs.folder, embedder, backbone), gpu=True)
    run_parts(
        stage,
        parts,
        look,
        title="Looking at pictures",
        total=sum(part["size"] for part in parts),
        summarise=lambda counts: NOTHING_SEEN | counts,
        check=partial(
            _check_share,
            most=corpus.config.max_skipped_share,
            where=corpus.config.path,
            before=read_manifest(pairs.folder),
        ),
    )
    return stage


def read_embedding_files(looked: Path) -> list[np.ndarray[Any, Any]]:
    """The embeddings of every file of pairs, (N, E) each, mapped into memory, in the order of the files."""
    return [np.load(file, mmap_mode="r") for file in sorted(looked.glob("embedded-*.npy"))]


def _locate(path: str) -> Location:
    return locate(str(resolve(path)) if path.startswith(EMBEDDED) else path)


def _identity(corpus: Corpus, units: list[Unit]) -> list[Any]:
    if corpus.config.identity == "listing" and not corpus.config.path.startswith(EMBEDDED):
        return [asdict(unit) for unit in units]
    # By content: a checkout that travels to a cluster keeps neither places nor times.
    paths = sorted({unit.path for unit in units})
    digest = ray.remote(_digest).options(num_cpus=1)
    digests = dict(zip(paths, ray.get([digest.remote(corpus.location, path) for path in paths]), strict=True))
    return [[unit.path, unit.part, digests[unit.path]] for unit in units]


def _digest(location: Location, path: str) -> str:
    # A unit may be a folder of pictures.
    files = [path] if location.exists(path) else [file.path for file in location.find("", folder=path)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.removeprefix(path).encode())
        with location.stream(file) as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _check_share(counts: Counts, *, most: float, where: str, before: Counts | None = None) -> None:
    skipped, read = counts.get("skipped", {}), counts.get("read", 0)
    if before and counts.get("complete"):
        # What reading has left out is part of the same share.
        skipped, read = add_counts(before["skipped"], skipped), before["read"]
    faults = {reason: count for reason, count in skipped.items() if reason not in reasons.CHOICES}
    wrong = sum(faults.values())
    # The first files of a corpus say little of it.
    if wrong > most * read and (read >= CHECKED_AFTER or counts.get("complete")):
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items(), key=_by_count))
        raise DataError(
            f"{wrong} of {read} samples of {where} cannot be used ({told}), more than the share "
            f"corpus.max_skipped_share ({most}): `mmicl corpus lint` names them; mend them, or raise it"
        )


def _by_count(item: tuple[str, int]) -> int:
    return -item[1]


def _read_part(part: Mapping[str, Any], folder: Path, *, corpus: Corpus) -> tuple[dict[str, int], Counts]:
    from mmicl_core.data.fetch import Fetcher

    reader = build_reader(corpus.location, corpus.config, corpus.images)
    rows, name, count = reader.read(Unit(**part["unit"])), part["name"], corpus.config.rows_per_file
    if not corpus.config.fetch.enabled:
        return write_pairs(rows, name, folder, count)
    with Fetcher(corpus.config.fetch) as fetcher:
        return write_pairs(rows, name, folder, count, fetcher)


def look_at_part(
    part: Mapping[str, Any], folder: Path, *, corpus: Corpus, pairs: Path, embedder: Any = None
) -> tuple[dict[str, int], Counts]:
    """Look at one file of pairs: `looked-NAME.arrow`, and `embedded-NAME.npy` where there is an embedder."""
    table = pq.read_table(pairs / part["file"], columns=list(LOOKED_AT))
    pictures = corpus.pictures(pairs)
    looked, vectors = Looker(pictures.read, corpus.config.max_pixels, embedder)(table)
    pictures.close()
    files = {f"looked-{part['name']}.arrow": looked.num_rows}
    write_arrow(folder / f"looked-{part['name']}.arrow", looked)
    if vectors is not None:
        np.save(folder / f"embedded-{part['name']}.npy", vectors)
        files[f"embedded-{part['name']}.npy"] = len(vectors)
    skipped = dict(Counter(filter(None, looked.column("skipped").to_pylist())))
    kept = looked.num_rows - sum(skipped.values())
    remarks = [remark for told in looked.column("remark").to_pylist() if told for remark in told.split(", ")]
    return files, {
        "read": looked.num_rows,
        "kept": kept,
        "skipped": skipped,
        "remarks": dict(Counter(remarks)),
    }


class _EmbeddingLook:
    """Looks at parts with one embedder, which is loaded once."""

    def __init__(self, corpus: Corpus, pairs: Path, embedder: EmbedderConfig, backbone: Path) -> None:
        import torch

        from mmicl_core.embedders import build_embedder

        torch.set_num_threads(1)
        self._look = partial(
            look_at_part, corpus=corpus, pairs=pairs, embedder=build_embedder(embedder, backbone)
        )

    def __call__(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        return self._look(part, folder)

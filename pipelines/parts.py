"""Stages made of parts: many workers make them side by side, and a kill costs only what was being made.

A part is a piece of work with a name. Its files are written under a temporary name and moved to their
place, and the note of its counts is moved last: a part without its note is made again, and gives the same
bytes. Until all parts are there, a stage lies in `NAME.partial`; then the manifest is written, what it does
not name is removed, and the folder takes its name. Whatever moment a kill comes at, the next run goes on
where it stopped.

    NAME.partial/.notes/PART.json     files with rows and SHA-256, counts
    NAME/_manifest.json               all of them, summed up

What a part holds depends on its description alone, never on who made it, in which order or beside what.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray

from mmicl_core.data.files import file_digest, write_atomic
from mmicl_core.data.schema import SCHEMA_VERSION
from pipelines.gauges import tell_part
from pipelines.mistakes import carried, raise_carried
from pipelines.progress import counting
from pipelines.stages import CONFIG_FILE, MANIFEST_FILE, Stage, read_manifest

__all__ = [
    "Build",
    "Counts",
    "Pool",
    "add_counts",
    "finish_parts",
    "reuse_finished",
    "make_parts",
    "run_parts",
]

log = logging.getLogger("mmicl")

NOTES = ".notes"
MAKING = ".making-"
MOST_BLOCKS = 2000

Counts = dict[str, Any]


class Build(Protocol):
    """Makes a part: writes its files into a folder."""

    def __call__(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        """The rows of each file by its name, and what was counted."""
        ...


@dataclass(frozen=True)
class Pool:
    """A pool of processes that each load something once: `make(*arguments)` gives a `Build`."""

    make: Callable[..., Build]
    arguments: tuple[Any, ...]
    gpu: bool = False
    """Whether each process takes a GPU where there is one."""


def run_parts(
    stage: Stage,
    parts: Sequence[Mapping[str, Any]],
    build: Build | Pool,
    *,
    title: str,
    total: int,
    summarise: Callable[[Counts], Counts] = lambda counts: counts,
    check: Callable[[Counts], None] = lambda counts: None,
    blocks: int = MOST_BLOCKS,
) -> dict[str, Any]:
    """Make the parts that are missing; give the manifest.

    Args:
        parts: descriptions, each with a `name` that is unique in the stage, and `size`, what it adds to
            the progress.
        build: makes one part; a function, or a pool of processes.
        total: of the progress: the sum of all sizes.
        summarise: all counts -> what the manifest says of them.
        check: raises where too much is wrong; called with the counts so far after every part, and with all
            of them and `complete` at last.
        blocks: most pieces that Ray Data hands out; it changes nothing in the result.
    """
    if reuse_finished(stage):
        manifest = read_manifest(stage.folder)
        # Another run may have allowed more.
        check(manifest | {"complete": True})
        return manifest
    make_parts(stage, parts, build, title=title, total=total, check=check, blocks=blocks)
    return finish_parts(stage, parts, summarise=summarise, check=check)


def reuse_finished(stage: Stage) -> bool:
    """Bring a stage whose end was broken off to it; tells whether there is a finished one, to be reused."""
    if not stage.complete and (_partial(stage) / MANIFEST_FILE).is_file():
        _take_name(stage)
    if stage.complete:
        stage.reuse()
    return stage.complete


def make_parts(
    stage: Stage,
    parts: Sequence[Mapping[str, Any]],
    build: Build | Pool,
    *,
    title: str,
    total: int,
    check: Callable[[Counts], None] = lambda counts: None,
    blocks: int = MOST_BLOCKS,
) -> Path:
    """Make the parts that are missing, and give the folder that they lie in until the stage is finished."""
    folder = _partial(stage)
    (folder / NOTES).mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if not _note(folder, part).is_file()]
    if len(missing) < len(parts):
        log.info("%s: %d of %d parts are there already", stage.name, len(parts) - len(missing), len(parts))
    if missing:
        before = total - sum(int(part["size"]) for part in missing)
        with counting(title, total) as counter:
            if before:
                ray.get(counter.resume.remote(before))
            _make(stage.name, missing, build, folder, counter, check, blocks)
    return folder


def finish_parts(
    stage: Stage,
    parts: Sequence[Mapping[str, Any]],
    *,
    summarise: Callable[[Counts], Counts] = lambda counts: counts,
    check: Callable[[Counts], None] = lambda counts: None,
    drop: str = "",
) -> dict[str, Any]:
    """Turn what `make_parts` made into the stage; give the manifest.

    Args:
        drop: a glob of files that were only needed on the way.
    """
    files: dict[str, Any] = {}
    counts: Counts = {}
    for part in parts:
        told = json.loads(_note(_partial(stage), part).read_text(encoding="utf-8"))
        files |= told["files"]
        counts = add_counts(counts, told["counts"])
    check(counts | {"complete": True})
    lasting = {name: about for name, about in sorted(files.items()) if not fnmatchcase(name, drop)}
    known = {"fingerprint": stage.fingerprint, "schema_version": SCHEMA_VERSION, "files": lasting}
    stage.describe(_partial(stage), known | summarise(counts))
    _take_name(stage)
    return read_manifest(stage.folder)


def add_counts(one: Counts, other: Counts) -> Counts:
    """The sum of two counts, nested alike."""
    total = dict(one)
    for key, value in other.items():
        if isinstance(value, dict):
            total[key] = add_counts(total.get(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value
    return total


def _take_name(stage: Stage) -> None:
    folder = _partial(stage)
    lasting = {CONFIG_FILE, MANIFEST_FILE, *read_manifest(folder)["files"]}
    for path in list(folder.iterdir()):
        if path.is_dir():
            # The notes, and what a lost worker was making.
            shutil.rmtree(path)
        elif path.name not in lasting:
            path.unlink()
    stage.seal(folder)


def _make(
    stage: str,
    missing: Sequence[Mapping[str, Any]],
    build: Build | Pool,
    folder: Path,
    counter: Any,
    check: Callable[[Counts], None],
    blocks: int,
) -> None:
    rows = [{"part": json.dumps(part)} for part in missing]
    described = ray.data.from_items(rows, override_num_blocks=min(len(rows), blocks))
    if isinstance(build, Pool):
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        gpus = int(ray.cluster_resources().get("GPU", 0)) if build.gpu else 0
        most = max(1, min(gpus or cpus, len(rows)))
        done = described.map_batches(
            _Maker,
            batch_size=1,
            fn_constructor_args=(build, folder, counter),
            # All are started at once, and one suffices where others hold the rest of the cluster.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
    else:
        made = partial(_make_batch, build=build, folder=folder, counter=counter)
        done = described.map_batches(made, batch_size=1)
    counts: Counts = {}
    for number, row in enumerate(done.iter_rows(), start=1):
        raise_carried(row)
        counted = json.loads(row["counts"])
        tell_part(stage, counted, left=len(missing) - number)
        counts = add_counts(counts, counted)
        check(counts)


def _make_batch(batch: dict[str, Any], *, build: Build, folder: Path, counter: Any) -> pa.Table:
    def make() -> pa.Table:
        parts = [json.loads(part) for part in batch["part"]]
        counts = [json.dumps(_make_part(part, build, folder)) for part in parts]
        ray.get(counter.add.remote(sum(int(part["size"]) for part in parts)))
        return pa.table({"counts": counts})

    return carried(make)


class _Maker:
    def __init__(self, pool: Pool, folder: Path, counter: Any) -> None:
        self._pool, self._folder, self._counter = pool, folder, counter

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        return _make_batch(batch, build=self._make, folder=self._folder, counter=self._counter)

    @cached_property
    def _build(self) -> Build:
        """Loaded with the first part, as what is wrong with it can be carried from there."""
        return self._pool.make(*self._pool.arguments)

    def _make(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        return self._build(part, folder)


def _make_part(part: Mapping[str, Any], build: Build, folder: Path) -> Counts:
    note = _note(folder, part)
    if note.is_file():
        # A worker that was lost after its last part leaves finished ones behind.
        told: Counts = json.loads(note.read_text(encoding="utf-8"))["counts"]
        return told
    temporary = Path(tempfile.mkdtemp(prefix=MAKING, dir=folder))
    try:
        rows, counts = build(part, temporary)
        files = {
            name: {"rows": count, "sha256": file_digest(temporary / name)}
            for name, count in sorted(rows.items())
        }
        for name in files:
            (temporary / name).replace(folder / name)
        write_atomic(note, json.dumps({"files": files, "counts": counts}))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _partial(stage: Stage) -> Path:
    return stage.folder.with_name(f"{stage.folder.name}.partial")


def _note(folder: Path, part: Mapping[str, Any]) -> Path:
    return folder / NOTES / f"{part['name']}.json"

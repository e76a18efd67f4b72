"""A look at a corpus and at episodes: numbers, pages, one episode drawn again.

    describe --> stages --read files one at a time--> counts, quantiles, thumbnails, difficulty

The stages are those of training: whatever is there is reused, and what is made here is reused there. Each
program gives plain values; pages are files of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.difficulty import measure_difficulty
from mmicl_core.data.episodes import needed_groupings, parse_id
from mmicl_core.data.files import write_atomic
from mmicl_core.data.neighbours import Neighbours
from mmicl_core.data.prototypes import gather_embeddings
from mmicl_core.data.sampling import sample_episodes, sample_pictures
from mmicl_core.data.survey import name_groups, survey_groups, survey_pairs
from mmicl_core.errors import DataError
from mmicl_core.evaluation.difficulty import add_intervals
from mmicl_core.evaluation.pages import thumbnail
from mmicl_core.evaluation.preview import (
    PreviewedEpisode,
    ShownPicture,
    render_corpus_preview,
    render_episodes_preview,
)
from pipelines.catalogue import Described
from pipelines.episodes import Source, build_episodes, describe, episodes_stage, redraw
from pipelines.lint import lint_corpus, look_through, printable, reference
from pipelines.pairs import read_embedding_files
from pipelines.stages import Stage, read_manifest

__all__ = [
    "corpus_stats",
    "lint_corpus",
    "measure_episodes",
    "preview_corpus",
    "preview_episodes",
    "show_episode",
]

log = logging.getLogger("mmicl")

MEASURED_EPISODES = 2000


def corpus_stats(run: RunConfig, root: Path) -> dict[str, Any]:
    """Numbers of a corpus: what was kept, sizes, captions, formats, licences, groups."""
    source = describe(run, root)
    described = source.described
    pairs, looked = (read_manifest(stage.folder) for stage in (described.pairs, described.looked))
    return {
        "corpus": run.corpus.path,
        "read": pairs["read"],
        "skipped": {"reading": pairs["skipped"], "looking": looked["skipped"]},
        "remarks": looked["remarks"],
        **survey_pairs(described.pairs.folder, described.looked.folder, described.parts),
        "groups": {
            grouping: survey_groups(Catalogue(source.catalogue(grouping).folder))
            for grouping in needed_groupings(run.episodes)
        },
    }


def preview_corpus(
    run: RunConfig, root: Path, *, most: int = 60, seed: int = 0, page: Path | None = None
) -> dict[str, Any]:
    """Write a page with pictures of a corpus.

    Args:
        most: pictures that are shown.
        seed: decides which.
        page: its file; None is `corpus-preview.html` in `root`.
    """
    source = describe(run, root)
    described = source.described
    found = look_through(source, run.episodes)
    thumbnails = _Thumbnails(described)
    folders = {"pairs": described.pairs, "looked": described.looked, "concepts": described.concepts}
    files = read_manifest(described.pairs.folder)["files"]
    rows = sample_pictures(
        {name: stage.folder for name, stage in folders.items()},
        {part: files[f"pairs-{part}.parquet"]["rows"] for part in described.parts},
        most,
        seed,
    )
    shown = [_shown(row, thumbnails(row["image"])) for row in rows]
    left_out = [
        ShownPicture(small, example["picture"], reason["reason"], example["detail"] or "", reason["stage"])
        for reason in found["reasons"]
        for example in reason["examples"]
        # What is no picture has nothing to show; lint names it.
        if (small := thumbnails(example["image"], quiet=True)) is not None
    ]
    where = page or root / "corpus-preview.html"
    write_atomic(where, render_corpus_preview(run.corpus.path, found, shown, left_out))
    return {"file": str(where), "pictures": len(shown), "left_out": len(left_out), "read": found["read"]}


def show_episode(run: RunConfig, root: Path, episode: str) -> dict[str, Any]:
    """Draw an episode of the run's recipe again, and hold it against the dataset, where that is written.

    Args:
        episode: its id, `SEED-NUMBER`.

    Returns:
        The `episode`, bytes in hex digits; the folder of the dataset (`written`), whether its row is the
        same (`equals_written`), and which columns are not (`differs_in`). Where there is no dataset, the
        first two are None.

    Raises:
        DataError: the id is none of this recipe, or its number cannot be drawn.
    """
    config = run.episodes
    seed, number = parse_id(episode)
    if seed != config.seed:
        raise DataError(
            f"episode {episode} is of the seed {seed}, and this recipe has episodes.seed {config.seed}: name "
            f"the recipe that drew it, or set --episodes.seed {seed}"
        )
    if number >= config.total:
        raise DataError(
            f"episode {episode} is beyond the {config.total} episodes of this recipe: the last one is "
            f"{seed}-{config.total - 1}"
        )
    source = describe(run, root)
    row, stage = redraw(source, config, number), episodes_stage(source, config, root)
    shown = {"episode": _plain(row), "written": None, "equals_written": None, "differs_in": []}
    if stage.complete:
        kept = _read_row(stage.folder, config, number) or {}
        differing = [name for name, value in row.items() if kept.get(name) != value]
        shown |= {"written": str(stage.folder), "equals_written": not differing, "differs_in": differing}
    return shown


def preview_episodes(
    run: RunConfig, root: Path, *, most: int = 24, page: Path | None = None
) -> dict[str, Any]:
    """Write a page with episodes and how hard they are; they are drawn first where that was not done.

    Args:
        most: episodes that are shown.
        page: its file; None is `episodes-preview.html` in `root`.
    """
    source = describe(run, root)
    stage = build_episodes(source, run.episodes, root)
    rows = sample_episodes(_episode_files(stage.folder), most).to_pylist()
    thumbnails = _Thumbnails(source.described)
    ids = {concept for row in rows for concept in row["concepts"]}
    names = name_groups(Catalogue(source.catalogue("concept").folder), ids) if ids else {}
    previewed = [
        PreviewedEpisode(
            row,
            [thumbnails(turn["image"]) for turn in row["turns"]],
            [names.get(concept, concept) for concept in row["concepts"]],
        )
        for row in rows
    ]
    difficulty = measure_episodes(source, run.episodes, stage)
    where = page or root / "episodes-preview.html"
    write_atomic(where, render_episodes_preview(read_manifest(stage.folder), previewed, difficulty))
    return {"file": str(where), "folder": str(stage.folder), "shown": len(rows), "difficulty": difficulty}


def measure_episodes(source: Source, config: EpisodeConfig, episodes: Stage) -> dict[str, Any] | None:
    """How hard the 2-way episodes of a written dataset are; None if it has none."""
    files = _episode_files(episodes.folder)
    sample = sample_episodes(files, MEASURED_EPISODES, "two_way")
    if not sample.num_rows:
        return None
    catalogue = Catalogue(source.catalogue("concept").folder)
    vectors = read_embedding_files(source.described.looked.folder)
    measured = measure_difficulty(
        sample,
        catalogue,
        Neighbours.open(source.neighbour_concepts().folder),
        config.near_duplicate_bits,
        partial(gather_embeddings, catalogue, files=vectors) if vectors else None,
    )
    return {"embedder": source.embedder.type if source.embedder else None} | add_intervals(measured)


class _Thumbnails:
    """Small pictures by their references."""

    def __init__(self, described: Described) -> None:
        self._pictures = described.corpus.pictures(described.pairs.folder)
        self._max_pixels = described.corpus.config.max_pixels

    def __call__(self, image: Mapping[str, Any] | None, *, quiet: bool = False) -> bytes | None:
        if image is None:
            return None
        try:
            return thumbnail(self._pictures.read(image), self._max_pixels)
        except DataError as error:
            if not quiet:
                log.warning("%s has nothing to show: %s", reference(image), printable(str(error)))
            return None


def _shown(row: Mapping[str, Any], small: bytes | None) -> ShownPicture:
    facts = [f"{row['width']} x {row['height']} {row['format']}", row["remark"], row["licence"]]
    title = row["name"] or row["concept"] or ""
    return ShownPicture(small, row["picture"], title, row["text"] or "", ", ".join(filter(None, facts)))


def _episode_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("episodes-*.parquet"))


def _read_row(folder: Path, config: EpisodeConfig, number: int) -> dict[str, Any] | None:
    file = folder / f"episodes-{number // config.episodes_per_file:05d}.parquet"
    rows = pq.read_table(file, filters=[("episode", "==", number)]).to_pylist()
    return dict(rows[0]) if rows else None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value

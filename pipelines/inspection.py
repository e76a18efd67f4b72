"""A look at a corpus and at episodes: faults, numbers, pages, one episode drawn again.

    describe --> stages --read files one at a time--> counts with examples, quantiles, thumbnails, difficulty

The stages are those of training: whatever is there is reused, and what is made here is reused there. Each
program gives plain values; pages are files of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.difficulty import measure_difficulty
from mmicl_core.data.episodes import needed_groupings, parse_id
from mmicl_core.data.files import write_atomic
from mmicl_core.data.neighbours import Neighbours
from mmicl_core.data.prototypes import gather_embeddings
from mmicl_core.data.reasons import CHOICES
from mmicl_core.data.sampling import sample_episodes, sample_pictures
from mmicl_core.data.survey import (
    find_examples,
    iter_left_out,
    iter_remarkable,
    name_groups,
    survey_groups,
    survey_pairs,
)
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
from pipelines.episodes import Source, build_episodes, describe, redraw
from pipelines.pairs import read_embedding_files
from pipelines.stages import Stage, read_manifest

__all__ = [
    "lint_corpus",
    "measure_episodes",
    "preview_corpus",
    "preview_episodes",
    "show_episode",
    "survey_corpus",
]

log = logging.getLogger("mmicl")

EXAMPLES = 3
MEASURED_EPISODES = 2000
MOST_TOLD = 160


def lint_corpus(run: RunConfig, root: Path) -> dict[str, Any]:
    """Read a corpus to its end, whatever is wrong with it; say what is, with examples.

    Returns:
        Samples `read`, and how many each stage `kept`; `reasons` and `remarks` with `count`, `share` of what
        was read, and `examples`; the `fault_share`, and whether the corpus has `passed`: whether that is
        within `corpus.max_skipped_share`. A table of it goes to the log.
    """
    lenient = run.corpus.model_copy(update={"max_skipped_share": 1.0})
    source = describe(run.model_copy(update={"corpus": lenient}), root)
    found = _look_through(source, run.episodes)
    read, most = found["read"], run.corpus.max_skipped_share
    faults = sum(reason["count"] for reason in found["reasons"] if reason["fault"])
    result = {
        "corpus": run.corpus.path,
        **found,
        "fault_share": faults / read if read else 0.0,
        "max_skipped_share": most,
        "passed": faults <= most * read,
    }
    for line in _table(result):
        log.info("%s", line)
    return result


def survey_corpus(run: RunConfig, root: Path) -> dict[str, Any]:
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
    run: RunConfig, root: Path, *, pictures: int = 60, seed: int = 0, file: Path | None = None
) -> dict[str, Any]:
    """Write a page with pictures of a corpus.

    Args:
        pictures: most that are shown.
        seed: decides which.
        file: of the page; None is `corpus-preview.html` in `root`.
    """
    source = describe(run, root)
    described = source.described
    found = _look_through(source, run.episodes)
    thumbnails = _Thumbnails(described)
    folders = {"pairs": described.pairs, "looked": described.looked, "concepts": described.concepts}
    files = read_manifest(described.pairs.folder)["files"]
    rows = sample_pictures(
        {name: stage.folder for name, stage in folders.items()},
        {part: files[f"pairs-{part}.parquet"]["rows"] for part in described.parts},
        pictures,
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
    page = render_corpus_preview(run.corpus.path, found, shown, left_out)
    where = file or root / "corpus-preview.html"
    write_atomic(where, page)
    return {"file": str(where), "pictures": len(shown), "left_out": len(left_out), "read": found["read"]}


def show_episode(run: RunConfig, root: Path, episode: str) -> dict[str, Any]:
    """Draw an episode of the run's recipe again, and hold it against the dataset, where that is written.

    Args:
        episode: its id, `SEED-NUMBER`.

    Returns:
        The `episode`, bytes in hex digits; the folder of the dataset (`written`) and whether its row is
        `equal`; both are None where there is no dataset.

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
    row, stage = redraw(source, config, number), _dataset(source, config, root)
    shown = {"episode": _plain(row), "written": None, "equal": None, "differs_in": []}
    if stage.complete:
        kept = _read_row(stage.folder, config, number) or {}
        differing = [name for name, value in row.items() if kept.get(name) != value]
        shown |= {"written": str(stage.folder), "equal": not differing, "differs_in": differing}
    return shown


def preview_episodes(
    run: RunConfig, root: Path, *, episodes: int = 24, file: Path | None = None
) -> dict[str, Any]:
    """Write a page with episodes and how hard they are; they are drawn first where that was not done.

    Args:
        episodes: most that are shown.
        file: of the page; None is `episodes-preview.html` in `root`.
    """
    source = describe(run, root)
    stage = build_episodes(source, run.episodes, root)
    rows = sample_episodes(_episode_files(stage.folder), episodes).to_pylist()
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
    where = file or root / "episodes-preview.html"
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
                log.warning("%s has nothing to show: %s", _reference(image), _printable(str(error)))
            return None


def _look_through(source: Source, config: EpisodeConfig) -> dict[str, Any]:
    """Counts of all stages, with examples of what was left out or is unusual."""
    described = source.described
    pairs, looked = described.pairs.folder, described.looked.folder
    read = read_manifest(pairs)["read"]
    left_out: dict[str, tuple[Path, Iterable[pa.Table]]] = {
        "reading": (pairs, iter_left_out(pairs)),
        "looking": (looked, iter_remarkable(pairs, looked, described.parts, "skipped")),
    }
    for grouping in needed_groupings(config):
        folder = source.catalogue(grouping).folder
        left_out[f"grouping by {grouping}"] = (folder, iter_left_out(folder))
    kept, reasons = {}, []
    for stage, (folder, tables) in left_out.items():
        manifest = read_manifest(folder)
        kept[stage] = manifest["kept"]
        reasons += [
            {"stage": stage, "reason": reason, "fault": reason not in CHOICES, **counted}
            for reason, counted in _exemplify(manifest["skipped"], tables, "skipped", read).items()
        ]
    remarkable = iter_remarkable(pairs, looked, described.parts, "remark")
    remarks = _exemplify(read_manifest(looked)["remarks"], remarkable, "remark", read)
    return {"read": read, "kept": kept, "reasons": reasons, "remarks": remarks}


def _exemplify(
    counts: Mapping[str, int], tables: Iterable[pa.Table], column: str, read: int
) -> dict[str, dict[str, Any]]:
    examples = find_examples(tables, column, counts, EXAMPLES)
    return {
        value: {
            "count": count,
            "share": count / read,
            "examples": [
                {"picture": row["picture"], "image": row["image"], "detail": row["detail"]}
                for row in examples[value]
            ],
        }
        for value, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    }


def _table(result: Mapping[str, Any]) -> Iterable[str]:
    yield f"{result['read']} samples read from {_printable(result['corpus'])}"
    for stage, kept in result["kept"].items():
        yield f"{kept:>9} kept in {stage}"
        for reason in result["reasons"]:
            if reason["stage"] == stage:
                kind = "fault" if reason["fault"] else "choice"
                yield from _lines(f"{reason['reason']} ({kind})", reason)
    for remark, counted in result["remarks"].items():
        yield from _lines(f"{remark} (remark)", counted)
    verdict = "within" if result["passed"] else "above"
    yield (
        f"{100 * result['fault_share']:.3g} % of the samples are faults, {verdict} corpus.max_skipped_share "
        f"({result['max_skipped_share']})"
    )


def _lines(label: str, counted: Mapping[str, Any]) -> Iterable[str]:
    yield f"{counted['count']:>9} {100 * counted['share']:>6.2f} %  {label}"
    for example in counted["examples"]:
        detail = f": {example['detail']}" if example["detail"] else ""
        told = f"{example['picture']} in {_reference(example['image'])}{detail}"
        yield f"{'':>20}{_printable(told)}"


def _reference(image: Mapping[str, Any] | None) -> str:
    if image is None:
        return "no file"
    return image["path"] + (f" ({image['member']})" if image["member"] else "")


def _printable(told: str) -> str:
    """One line without what would move a terminal's cursor: names come from a stranger's files."""
    line = "".join(letter if letter.isprintable() else "?" for letter in told)
    return line if len(line) <= MOST_TOLD else line[: MOST_TOLD - 3] + "..."


def _shown(row: Mapping[str, Any], small: bytes | None) -> ShownPicture:
    facts = [f"{row['width']} x {row['height']} {row['format']}", row["remark"], row["licence"]]
    title = row["name"] or row["concept"] or ""
    return ShownPicture(small, row["picture"], title, row["text"] or "", ", ".join(filter(None, facts)))


def _dataset(source: Source, config: EpisodeConfig, root: Path) -> Stage:
    """The stage that `build_episodes` makes, under the same name, whether it is there or not."""
    groupings = needed_groupings(config)
    stages = [source.catalogue(grouping) for grouping in groupings]
    if "concept" in groupings:
        stages.append(source.neighbour_concepts())
    return Stage(
        root,
        "episodes",
        made_of=[stage.fingerprint for stage in stages],
        config=config.model_dump(mode="json", exclude={"preset", "count", "streamed"}),
    )


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

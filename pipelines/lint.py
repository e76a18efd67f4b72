"""What is wrong with a corpus, or unusual in it: counts by reason, and where to look.

    pairs (skipped) -> looked (skipped, remark) -> catalogues (skipped) --first few of each--> examples

A sample is left out for a fault of the input or by a choice of the run; faults alone count against
`corpus.max_skipped_share`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.episodes import needed_groupings
from mmicl_core.data.reasons import CHOICES
from mmicl_core.data.survey import find_examples, iter_left_out, iter_remarkable
from pipelines.episodes import Source, describe
from pipelines.pairs import open_corpus, read_pairs
from pipelines.stages import read_manifest

__all__ = ["lint_corpus", "look_through", "printable", "reference"]

log = logging.getLogger("mmicl")

LeftOut = dict[str, tuple[Path, Iterable[pa.Table]]]
"""Stage -> its folder, and the rows that it left out."""

EXAMPLES = 3
MOST_TOLD = 160


def lint_corpus(run: RunConfig, root: Path) -> dict[str, Any]:
    """Read a corpus to its end, whatever is wrong with it; say what is, with examples.

    Returns:
        Samples `read`, and how many each stage `kept`; `reasons` and `remarks` with `count`, `share` of what
        was read, and `examples`; the `fault_share`, and whether the corpus has `passed`: whether that is
        within `corpus.max_skipped_share`. A table of it goes to the log.
    """
    lenient = run.corpus.model_copy(update={"max_skipped_share": 1.0})
    pairs = read_pairs(open_corpus(lenient, run.concepts), root).folder
    if read_manifest(pairs)["kept"]:
        source = describe(run.model_copy(update={"corpus": lenient}), root)
        found = look_through(source, run.episodes)
    else:
        # There is nothing to look at, and nothing to group.
        found = _gather({"reading": (pairs, iter_left_out(pairs))}) | {"remarks": {}}
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


def look_through(source: Source, config: EpisodeConfig) -> dict[str, Any]:
    """Counts of all stages, with examples of what was left out or is unusual."""
    described = source.described
    pairs, looked = described.pairs.folder, described.looked.folder
    left_out: LeftOut = {
        "reading": (pairs, iter_left_out(pairs)),
        "looking": (looked, iter_remarkable(pairs, looked, described.parts, "skipped")),
    }
    for grouping in needed_groupings(config):
        folder = source.catalogue(grouping).folder
        left_out[f"grouping by {grouping}"] = (folder, iter_left_out(folder))
    found = _gather(left_out)
    remarkable = iter_remarkable(pairs, looked, described.parts, "remark")
    remarks = _exemplify(read_manifest(looked)["remarks"], remarkable, "remark", found["read"])
    return found | {"remarks": remarks}


def _gather(left_out: LeftOut) -> dict[str, Any]:
    """Counts of stages, of which the first has read the corpus."""
    kept, reasons, read = dict[str, int](), list[dict[str, Any]](), 0
    for stage, (folder, tables) in left_out.items():
        manifest = read_manifest(folder)
        read = read or manifest["read"]
        kept[stage] = manifest["kept"]
        reasons += [
            {"stage": stage, "reason": reason, "fault": reason not in CHOICES, **counted}
            for reason, counted in _exemplify(manifest["skipped"], tables, "skipped", read).items()
        ]
    return {"read": read, "kept": kept, "reasons": reasons}


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
    yield f"{result['read']} samples read from {printable(result['corpus'])}"
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
        place = f" in {reference(example['image'])}" if example["image"] else ""
        detail = f": {example['detail']}" if example["detail"] else ""
        yield f"{'':>20}{printable(example['picture'] + place + detail)}"


def reference(image: Mapping[str, Any]) -> str:
    """Where a picture lies, for people."""
    return f"{image['path']} ({image['member']})" if image["member"] else str(image["path"])


def printable(told: str) -> str:
    """One line without what would move a terminal's cursor: names come from a stranger's files."""
    line = "".join(letter if letter.isprintable() else "?" for letter in told)
    return line if len(line) <= MOST_TOLD else line[: MOST_TOLD - 3] + "..."

"""A corpus, and the episodes drawn from it, as pages to look at: pictures with what is said of them.

Whatever a corpus says is shown as text (`mmicl_core.evaluation.pages`). Pictures come as thumbnails, made by
the caller; what cannot be decoded leaves an empty frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmicl_core.evaluation.difficulty import render_difficulty
from mmicl_core.evaluation.page_charts import Bar, bar_chart
from mmicl_core.evaluation.pages import VERMILION, facts_table, picture, render_page, text

__all__ = ["PreviewedEpisode", "ShownPicture", "render_corpus_preview", "render_episodes_preview"]

STYLE = """
figure{width:8.2rem;padding:.4rem;box-sizing:border-box}
figure img,.empty{display:block;margin:0 auto .3rem;max-width:100%;height:7rem;object-fit:contain}
.empty{line-height:7rem;background:#f1f4f7;color:var(--soft);font-size:.8rem}
figcaption{font-size:.8rem;line-height:1.35}
figcaption>*{display:block}
.name,.few,.key{display:-webkit-box!important;-webkit-box-orient:vertical;-webkit-line-clamp:3;overflow:hidden}
.key{-webkit-line-clamp:2;font:.7rem/1.3 ui-monospace,monospace;color:var(--soft)}
.name,.tag{font-weight:600}
.small{font-size:.75rem}
article{border-top:1px solid var(--rule);padding:.8rem 0}
article h3{font-size:1rem;margin:0}
article p{margin:.1rem 0 .6rem}
article .row{gap:.4rem}
article figure img,article .empty{height:5rem}
article .empty{line-height:5rem}
figure.query{border:2px solid var(--ink)}
figure.first{border-top:5px solid var(--first)}
figure.second{border-top:5px solid var(--second)}
figure.talk{width:16.8rem}
.wordy figure{width:12.5rem;text-align:left}
.wordy .name,.wordy .few{-webkit-line-clamp:6}
.tag.first{color:var(--first)}
.tag.second{color:#b4551a}
"""
CLASSES = ("first", "second")
WORDY = 40


@dataclass(frozen=True)
class ShownPicture:
    """A picture of a corpus, and what is known of it."""

    thumbnail: bytes | None
    """None: it cannot be decoded."""
    key: str
    title: str
    """What it shows, or why it was left out."""
    caption: str
    note: str
    """Size, terms and the like."""


@dataclass(frozen=True)
class PreviewedEpisode:
    """An EPISODE row with its pictures."""

    row: Mapping[str, Any]
    thumbnails: Sequence[bytes | None]
    """One for each turn; None where there is nothing to show."""
    concepts: Sequence[str]
    """The true names of its classes."""


def render_corpus_preview(
    corpus: str, counts: Mapping[str, Any], sampled: Sequence[ShownPicture], left_out: Sequence[ShownPicture]
) -> str:
    """The page of a corpus.

    Args:
        corpus: its name.
        counts: samples `read`; how many were `kept` by each stage; `reasons`, each with its `stage`, `reason`
            and `count`.
        sampled: pictures that are kept.
        left_out: some of those that are not, titled by the reason.
    """
    read = counts["read"]
    parts = [
        "<h1>A look at a corpus</h1>",
        f"<p class=lead>{text(corpus)}: {read} samples, {len(sampled)} pictures shown.</p>",
        "<h2>What became of the samples</h2>",
        bar_chart("What became of the samples", _what_became(counts)),
        "<h2>Pictures, evenly spread</h2>",
        _row(map(_shown_picture, sampled)),
    ]
    if left_out:
        parts += ["<h2>Some that were left out</h2>", _row(map(_shown_picture, left_out))]
    return render_page("mmicl corpus preview", parts, STYLE)


def render_episodes_preview(
    counts: Mapping[str, Any], episodes: Sequence[PreviewedEpisode], difficulty: Mapping[str, Any] | None
) -> str:
    """The page of a dataset of episodes.

    Args:
        counts: its manifest: `read`, `built`, `skipped_by_reason`.
        difficulty: as `render_difficulty` takes it; None where there is no 2-way episode.
    """
    skipped = counts["skipped_by_reason"]
    parts = [
        "<h1>A look at episodes</h1>",
        f"<p class=lead>{counts['built']} episodes, {len(episodes)} shown in the order of their numbers.</p>",
    ]
    if skipped:
        facts = {reason: str(count) for reason, count in skipped.items()}
        parts += ["<h2>Numbers that could not be drawn</h2>", facts_table(facts)]
    if difficulty is not None:
        parts += render_difficulty(difficulty)
    parts += ["<h2>Episodes, evenly spread</h2>", *map(_episode, episodes)]
    return render_page("mmicl episodes preview", parts, STYLE)


def _what_became(counts: Mapping[str, Any]) -> list[Bar]:
    bars, read = [], counts["read"]
    for stage, kept in counts["kept"].items():
        bars.append(Bar(f"kept in {stage}", _share(kept, read), _told(kept, read)))
        for reason in counts["reasons"]:
            if reason["stage"] == stage:
                count = reason["count"]
                bars.append(Bar(reason["reason"], _share(count, read), _told(count, read), colour=VERMILION))
    return bars


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0


def _told(count: int, total: int) -> str:
    return f"{count} ({100 * _share(count, total):.3g} %)"


def _row(figures: Iterable[str]) -> str:
    return f"<div class=row>{''.join(figures)}</div>"


def _picture(thumbnail: bytes | None) -> str:
    return "<div class=empty>no picture</div>" if thumbnail is None else picture(thumbnail)


def _shown_picture(shown: ShownPicture) -> str:
    lines = [
        text(told, kind)
        for told, kind in (
            (shown.title, "name"),
            (shown.caption, "few"),
            (shown.note, "small soft"),
            (shown.key, "key"),
        )
        if told
    ]
    return f"<figure>{_picture(shown.thumbnail)}<figcaption>{''.join(lines)}</figcaption></figure>"


def _episode(episode: PreviewedEpisode) -> str:
    row = episode.row
    *shown, query = zip(row["turns"], episode.thumbnails, strict=True)
    facts = [f"{row['task'].replace('_', ' ')}, {row['shots_of_both_classes']} demonstrations"]
    if row["rank"] is not None:
        facts.append(f"neighbour {row['rank']}, similarity {row['similarity']:.3f}")
    questions = {turn["question"] for turn in row["turns"]}
    one = questions.pop() if len(questions) == 1 else None
    if one is not None:
        facts.append(f"asked: {text(one, 'tag')}")
    figures = [_turn(row, turn, small, one) for turn, small in shown]
    figures.append(_turn(row, *query, None, is_query=True))
    longest = max(len(turn[told]) for turn in row["turns"] for told in ("question", "answer"))
    return (
        f"<article class={'wordy' if longest > WORDY else 'brief'}><h3>{text(row['id'])}</h3>"
        f"<p class=soft>{'; '.join(facts)}</p>{_classes(episode)}{_row(figures)}</article>"
    )


def _classes(episode: PreviewedEpisode) -> str:
    told = [
        f"<span class='tag {place}'>{text(name)}</span> called {text(called, 'tag')}"
        for place, name, called in zip(CLASSES, episode.concepts, episode.row["names"], strict=False)
    ]
    return f"<p>{' against '.join(told)}</p>" if told else ""


def _class_of(turn: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    concepts = row["concepts"]
    return CLASSES[concepts.index(turn["concept"])] if turn["concept"] in concepts else ""


def _turn(
    row: Mapping[str, Any],
    turn: Mapping[str, Any],
    thumbnail: bytes | None,
    common_question: str | None,
    *,
    is_query: bool = False,
) -> str:
    lines = [] if turn["question"] == common_question else [text(turn["question"], "few soft")]
    lines.append(text(turn["answer"], "name"))
    if is_query:
        lines.append(f"<span class=small>the query{', not ' * bool(row['other'])}{text(row['other'])}</span>")
    # A turn without a picture goes on about the one before.
    shown = _picture(thumbnail) if turn["picture"] is not None else ""
    kinds = f"{_class_of(turn, row)} {'query' * is_query} {'talk' * (not shown)}"
    return f"<figure class='{kinds}'>{shown}<figcaption>{''.join(lines)}</figcaption></figure>"

"""What may be trained on and what is kept for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError

__all__ = ["Split", "share_of"]

FILE = "split.json"


@dataclass(frozen=True)
class Split:
    """Concepts never trained on, in any style, and one style never trained on, for any concept.

    The corpus names them in its `split.json`; without one, a share of the concepts is held out by hash.
    """

    held_out_concepts: frozenset[str] = frozenset()
    held_out_style: str | None = None
    held_out_share: float = 0.0
    seed: int = 0

    @classmethod
    def load(cls, corpus: Location, share: float = 0.0, seed: int = 0) -> Split:
        """Read `split.json` beside the files of a corpus, or hold out a share of its concepts.

        Raises:
            DataError: the file lacks a field, or says what `share` says otherwise.
        """
        if not corpus.exists(FILE):
            return cls(held_out_share=share, seed=seed)
        if share:
            raise DataError(
                f"{corpus.uri} names its held-out concepts in {FILE}, and concepts.held_out_share ({share}) "
                "chooses others: leave it at 0"
            )
        with corpus.stream(FILE) as file:
            content = file.read()
        try:
            split = json.loads(content)
            concepts, style = split["held_out_concepts"], split.get("held_out_style")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{corpus.uri}/{FILE} is not a split: {error!r}") from error
        # A bare word would pass for the set of its letters, and nothing would be held out.
        named = [*concepts, style] if isinstance(concepts, list) and style is not None else concepts
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise DataError(
                f"{corpus.uri}/{FILE} is not a split: it takes a list of concepts and the name of a style"
            )
        return cls(frozenset(concepts), style)

    def plain(self) -> list[Any]:
        """For fingerprints."""
        return [sorted(self.held_out_concepts), self.held_out_style, self.held_out_share, self.seed]

    def holds_out(self, concept: str) -> bool:
        """Whether a concept is never trained on."""
        if self.held_out_share:
            return share_of(concept, self.seed) < self.held_out_share
        return concept in self.held_out_concepts

    def check(self, concepts: Collection[str], styles: Collection[str]) -> None:
        """Hold the split against what of it was met in a corpus.

        Raises:
            DataError: it holds out what the corpus does not have, so something else may be trained on.
        """
        unknown = sorted(self.held_out_concepts - set(concepts))
        style_is_unknown = self.held_out_style is not None and self.held_out_style not in styles
        if unknown or style_is_unknown:
            what = f"concept {unknown[0]!r}" if unknown else f"style {self.held_out_style!r}"
            raise DataError(
                f"split.json holds out the {what}, which no picture of the corpus has: correct its name, "
                "or what it was meant to hold out is trained on"
            )


def share_of(name: str, seed: int) -> float:
    """A number in [0, 1) that a name has for a seed, evenly spread over names."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56

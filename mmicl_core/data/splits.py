"""What may be trained on and what is kept for evaluation; read from a corpus's `split.json`."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmicl_core.errors import DataError

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """Concepts never trained on, in any style, and one style never trained on, for any concept."""

    held_out_concepts: frozenset[str]
    held_out_style: str

    @classmethod
    def load(cls, corpus: Path) -> Split:
        """Read `split.json`.

        Raises:
            DataError: it is missing or lacks a field.
        """
        path = corpus / "split.json"
        if not path.is_file():
            raise DataError(
                f"{path} is missing: a corpus names its held-out concepts and style there, "
                'as {"held_out_concepts": [...], "held_out_style": "..."}'
            )
        try:
            split = json.loads(path.read_text(encoding="utf-8"))
            concepts, style = split["held_out_concepts"], split["held_out_style"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a split: {error!r}") from error
        # A bare word would pass for the set of its letters, and nothing would be held out.
        if not isinstance(concepts, list) or not all(isinstance(name, str) for name in [*concepts, style]):
            raise DataError(f"{path} is not a split: it takes a list of concepts and the name of a style")
        return cls(frozenset(concepts), style)

    def plain(self) -> list[Any]:
        """For fingerprints."""
        return [sorted(self.held_out_concepts), self.held_out_style]

    def check(self, concepts: Set[str], styles: Set[str]) -> None:
        """Hold the split against a corpus.

        Raises:
            DataError: it holds out what the corpus does not have, so something else may be trained on.
        """
        unknown = sorted(self.held_out_concepts - concepts)
        if unknown or self.held_out_style not in styles:
            what = f"concept {unknown[0]!r}" if unknown else f"style {self.held_out_style!r}"
            raise DataError(
                f"split.json holds out the {what}, which no picture of the corpus has: correct its name, "
                "or what it was meant to hold out is trained on"
            )

    def trains_on(self, concept: str, style: str) -> bool:
        """Whether a picture may be seen in training."""
        return concept not in self.held_out_concepts and style != self.held_out_style

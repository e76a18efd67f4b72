"""What may be trained on and what is kept for evaluation; read from a corpus's `split.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

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

    def trains_on(self, concept: str, style: str) -> bool:
        """Whether a picture may be seen in training."""
        return concept not in self.held_out_concepts and style != self.held_out_style

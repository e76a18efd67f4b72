"""Which method is tested around which family of models, as the README shows it."""

from __future__ import annotations

from tests.families import NAMES
from tests.methods import METHOD_NAMES

__all__ = ["support_table"]


def support_table() -> str:
    """The families and methods that `tests/unit/backbones/test_parity.py` runs, every pair of them."""
    head = ["| model family | " + " | ".join(f"`{name}`" for name in METHOD_NAMES) + " |"]
    head.append("|" + "---|" * (len(METHOD_NAMES) + 1))
    return "\n".join([*head, *("| " + name + " | yes" * len(METHOD_NAMES) + " |" for name in NAMES)])

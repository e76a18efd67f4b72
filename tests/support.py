"""Which method is tested around which family of models, as the README shows it."""

from __future__ import annotations

from tests.families import NAMES
from tests.methods import METHOD_NAMES

__all__ = ["support_table"]


def support_table() -> str:
    """The families and methods that `tests/unit/backbones/test_parity.py` runs, every pair of them."""
    families = ", ".join(NAMES)
    methods = ", ".join(f"`{name}`" for name in METHOD_NAMES)
    return f"| model families | methods, each around all of them |\n|---|---|\n| {families} | {methods} |"

"""Small text files with one thing a line."""

from __future__ import annotations

from pathlib import Path

from mmicl_core.errors import DataError

__all__ = ["read_lines"]


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank, without the space around them.

    Raises:
        DataError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]

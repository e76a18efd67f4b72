"""Files that several processes share: one writer at a time, whole or absent, errors that name the folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mmicl_core.errors import BankError

__all__ = ["SUFFIX", "disk_errors", "locked", "stored_files"]

SUFFIX = ".safetensors"
# A file that is being written has a name that starts with a dot; its writer may have been killed.
ABANDONED_SECONDS = 3600


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What the disk refuses, told with the folder and a remedy.

    Raises:
        BankError: the disk is full, or the folder cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise BankError(
            f"the bank in {folder} cannot be used ({error.strerror or error}): free space on its disk, or "
            "set `bank` to a folder that can be read and written"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[TextIO]:
    """Hold a lock file, made where it is missing, against every thread and process; it ends with them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def stored_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Files of a folder that are complete; those that a killed writer left are removed."""
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        for file in found:
            if not file.name.endswith(SUFFIX) and SUFFIX in file.name:
                _remove_abandoned(file)
            elif not file.name.startswith(".") and file.name.endswith(SUFFIX):
                yield file


def _remove_abandoned(file: os.DirEntry[str]) -> None:
    # Another process may have finished or removed it.
    with suppress(FileNotFoundError):
        if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
            Path(file.path).unlink()

"""Files that are complete or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_directory", "file_digest", "folder_digest", "replace_directory", "write_atomic"]


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well.

    An existing `target` is replaced; a failed block leaves it as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    # mkdtemp makes folders that only their owner can enter; a result is read by other users too.
    temporary.chmod(0o755)
    try:
        yield temporary
        replace_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(source: Path, target: Path) -> None:
    """Give a folder the name `target`; a folder that has it goes, unless this fails."""
    if not target.exists():
        source.rename(target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(retired / target.name)
    try:
        source.rename(target)
    except OSError:
        (retired / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def folder_digest(folder: Path, suffixes: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """Sixteen hex digits that name the files of a folder that end in `suffixes`, by name and content.

    Args:
        without: names of files that do not count.
    """
    digest = hashlib.sha256()
    counted = (path for path in folder.iterdir() if path.suffix in suffixes and path.name not in without)
    for path in sorted(counted):
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | str, mode: int = 0o644, *, durable: bool = True) -> None:
    """Write a file under a temporary name and rename it over `path`.

    Args:
        mode: who may read it; until then nobody but its owner can.
        durable: wait for the disk, some milliseconds. Without, a power cut can leave an empty file, which
            serves what is verified when it is read and can be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)

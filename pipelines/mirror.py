"""A second place for checkpoints, on whatever filesystem Arrow opens, filled while training goes on.

On an object store a folder has no name that could change at the end, so `state.json` goes last: a checkpoint
without it is not whole.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyarrow import fs

from mmicl_core.data.files import atomic_directory
from mmicl_core.errors import ConfigError
from mmicl_core.training.checkpoint import ABOUT_FILE, TENSORS_FILE, Checkpoints

__all__ = ["Mirror"]

log = logging.getLogger("mmicl")

ORDER = (TENSORS_FILE, ABOUT_FILE)


class Mirror:
    """Copies checkpoints, one after the other, in a thread.

    A copy that fails does not stop training: it is warned of and counted in `failed`, and the next checkpoint
    is copied all the same.
    """

    def __init__(self, filesystem: Any, base: str, checkpoints: Checkpoints) -> None:
        self._filesystem, self._base, self._checkpoints = filesystem, base.rstrip("/"), checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._sent: list[Future[None]] = []
        self.failed = 0

    @classmethod
    def of(cls, place: str | None, name: str, checkpoints: Checkpoints) -> Mirror:
        """The mirror at a folder or URI, of the run `name`; None copies nothing.

        Raises:
            ConfigError: no filesystem of Arrow opens it.
        """
        if place is None:
            return _NoMirror(None, "", checkpoints)
        try:
            filesystem, base = fs.FileSystem.from_uri(
                place if "://" in place else str(Path(place).absolute())
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"train.checkpoints.mirror {place} cannot be opened: {error}") from error
        return cls(filesystem, f"{base}/{name}", checkpoints)

    def send(self, checkpoint: Path) -> None:
        """Copy a checkpoint in the background, and remove there what is no longer kept here."""
        self._sent.append(self._thread.submit(self._copy, checkpoint))

    def fetch(self) -> Path | None:
        """Bring the newest whole checkpoint back where the run has none of its own; gives where it now is.

        Raises:
            ConfigError: the mirror cannot be read.
        """
        if self._checkpoints.newest() is not None:
            return None
        try:
            names = [name for name in self._names() if self._is_whole(name)]
            if not names:
                return None
            newest = max(names)
            with atomic_directory(self._checkpoints.folder / newest) as temporary:
                for file in ORDER:
                    with self._filesystem.open_input_stream(f"{self._base}/{newest}/{file}") as stream:
                        (temporary / file).write_bytes(stream.read())
        except OSError as error:
            raise ConfigError(f"the mirror {self._base} cannot be read: {error}") from error
        log.info("Going on from %s/%s, as the run's own folder holds no checkpoint", self._base, newest)
        return self._checkpoints.folder / newest

    def close(self) -> None:
        """Wait until everything is copied."""
        self._thread.shutdown()
        if self.failed:
            log.warning("%d of %d checkpoints did not reach %s", self.failed, len(self._sent), self._base)

    def _copy(self, checkpoint: Path) -> None:
        target = f"{self._base}/{checkpoint.name}"
        try:
            self._filesystem.create_dir(target, recursive=True)
            for file in ORDER:
                with self._filesystem.open_output_stream(f"{target}/{file}") as stream:
                    stream.write((checkpoint / file).read_bytes())
            kept = {path.name for path in self._checkpoints.folder.glob("step-*")} | {checkpoint.name}
            for name in self._names():
                if name not in kept:
                    self._filesystem.delete_dir(f"{self._base}/{name}")
        except OSError as error:
            if not checkpoint.exists():
                # Replaced by newer ones, which follow, before its turn came.
                return
            self.failed += 1
            log.warning("Checkpoint %s did not reach %s: %s", checkpoint.name, self._base, error)

    def _names(self) -> list[str]:
        found = self._filesystem.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
        return [info.base_name for info in found if info.type == fs.FileType.Directory]

    def _is_whole(self, name: str) -> bool:
        info = self._filesystem.get_file_info(f"{self._base}/{name}/{ABOUT_FILE}")
        return bool(info.type == fs.FileType.File)


class _NoMirror(Mirror):
    """There is no second place."""

    def send(self, checkpoint: Path) -> None:
        """Do nothing."""

    def fetch(self) -> Path | None:
        """Find nothing."""
        return None

"""A folder of class folders of picture files, as ImageNet lies on disk -> PAIR rows.

A unit is a class folder with all that lies below it; its name is the concept. Files there that are no
pictures by their suffix are counted. Right below the corpus's own folder only pictures are, as pictures
without a concept; other files there (a licence, `split.json`, the file of names) speak of the corpus.

Pictures are given by their place; none is opened. For the identity of the corpus a unit has the sum of its
files' sizes and the latest of their times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmicl_core.config.corpus import ClassFoldersConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers.base import MOST_PICTURE_BYTES, Row, Unit, image_at, skip, usable
from mmicl_core.data.storage import CORPUS, URI, FoundFile, Location, locate
from mmicl_core.errors import DataError

__all__ = ["ClassFolderReader"]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ClassFolderReader:
    """Reads class folders; a unit is a folder, and `""` what lies beside them."""

    location: Location
    config: ClassFoldersConfig

    def units(self) -> list[Unit]:
        """The class folders that hold files, in name order; before them `""`, if pictures lie beside them.

        Raises:
            DataError: there is none, or the file of names lacks one of them.
        """
        folders = [unit for folder in self.location.folders() for unit in self._unit(folder)]
        if not folders:
            raise DataError(
                f"{self.location} holds no class folder with files: a corpus of this kind is a folder with "
                "one folder of pictures for each class"
            )
        for unit in folders:
            self._name(unit.path)
        return [*self._unit(""), *folders]

    def read(self, unit: Unit) -> Iterator[Row]:
        """The files of a class folder, in name order."""
        for file in self._files(unit.path):
            image = image_at(CORPUS + file.path, size=file.size)
            if not _is_picture(file):
                told = f"a picture ends in one of {', '.join(PICTURE_SUFFIXES)}"
                yield skip(file.path, reasons.UNSUPPORTED_FORMAT, told, image)
            elif not unit.path:
                yield skip(file.path, reasons.NO_CONCEPT, "it lies beside the class folders", image)
            elif file.size > MOST_PICTURE_BYTES:
                told = f"it has {file.size} bytes, {MOST_PICTURE_BYTES} are read at most"
                yield skip(file.path, reasons.TOO_MANY_BYTES, told, image)
            else:
                yield usable(file.path, image=image, concept=unit.path, name=self._name(unit.path))

    def _unit(self, folder: str) -> Iterator[Unit]:
        size = time_ns = count = 0
        for file in self._files(folder):
            size, time_ns, count = size + file.size, max(time_ns, file.time_ns), count + 1
        if count:
            yield Unit(folder, 0, size, time_ns)

    def _files(self, folder: str) -> Iterator[FoundFile]:
        if folder:
            yield from self.location.find("", folder=folder)
        else:
            yield from filter(_is_picture, self.location.find("", recursive=False))

    def _name(self, folder: str) -> str:
        if self.config.names is None:
            return folder.replace("_", " ")
        if folder not in self._names:
            raise DataError(
                f"{self.config.names} has no name for the class folder {folder!r} of {self.location}: add "
                "it, or set names to null for the folders' own names"
            )
        return self._names[folder]

    @cached_property
    def _names(self) -> Mapping[str, str]:
        path = str(self.config.names)
        own = not (path.startswith("/") or URI.match(path))
        place, file = (self.location, path) if own else ((there := locate(path)), there.pattern)
        try:
            with place.stream(file) as stream:
                names: Any = json.loads(stream.read())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"the names of the classes, {path}, cannot be read: {error}") from error
        if not isinstance(names, dict) or not all(
            isinstance(name, str) and name.strip() for name in names.values()
        ):
            raise DataError(
                f"the names of the classes, {path}, are not an object of folder -> name: write them as "
                '{"n02123045": "tabby cat"}'
            )
        return names


def _is_picture(file: FoundFile) -> bool:
    return file.path.lower().endswith(PICTURE_SUFFIXES)

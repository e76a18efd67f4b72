"""Stages of a run: named by what makes them, complete or absent, done once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mmicl_core.config.base import fingerprint
from mmicl_core.data.files import atomic_directory, replace_directory, write_atomic

__all__ = ["CONFIG_FILE", "MANIFEST_FILE", "Stage", "read_manifest"]

log = logging.getLogger("mmicl")

MANIFEST_FILE = "_manifest.json"
CONFIG_FILE = "_config.json"
VERSION = 9
# What this process made, or has said that it reuses.
TOLD = set[Path]()


class Stage:
    """A folder that `build` fills, under a name that ends in the fingerprint of its settings.

    Args:
        root: folder of the run.
        name: what the stage makes.
        settings: everything that the result depends on; models and plain values.
    """

    def __init__(self, root: Path, name: str, **settings: Any) -> None:
        self.settings = {
            key: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            for key, value in settings.items()
        }
        self.name = name
        self.fingerprint = fingerprint(VERSION, name, self.settings)
        self.folder = (root / f"{name}-{self.fingerprint}").absolute()

    @property
    def complete(self) -> bool:
        """Whether an earlier run finished it."""
        return (self.folder / MANIFEST_FILE).is_file()

    def run(self, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Give the manifest; call `build` with a temporary folder only if there is none yet.

        `build` returns what the manifest shall say. The folder appears when it is whole.
        """
        if self.complete:
            return self.reuse()
        with atomic_directory(self.folder) as folder:
            manifest = build(folder)
            self.describe(folder, manifest)
        TOLD.add(self.folder)
        return manifest

    def reuse(self) -> dict[str, Any]:
        """The manifest of a finished stage, which is told once."""
        if self.folder not in TOLD:
            log.info("%s: unchanged, reused from %s", self.name, self.folder.name)
            TOLD.add(self.folder)
        return read_manifest(self.folder)

    def describe(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Write down what made the files of a folder, and what they are."""
        write_atomic(folder / CONFIG_FILE, _json(self.settings))
        write_atomic(folder / MANIFEST_FILE, _json(manifest))

    def seal(self, partial: Path) -> None:
        """Turn a described folder into the stage."""
        TOLD.add(self.folder)
        replace_directory(partial, self.folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished stage says of itself."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    return manifest


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"

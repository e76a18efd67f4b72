"""Demonstration bank: fused tokens on disk, named by everything that they were made from.

Demonstrations are read apart from each other and from the query, so their fused tokens can be kept
and put before any query. A pack is a few demonstrations that are used together:

    pack id   digest of backbone, template, adapter and, in order, every picture's bytes and words
    file      BANK/<pack id>.safetensors: array NUMBER, float32 (T, D), for each demonstration;
              in the header, under `pack`, JSON with what made it, token counts and a digest of the arrays

One file holds both, so that a pack is whole or absent, and two writers of the same pack cannot mix
their halves. No model is known here: bytes, arrays and keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmicl_core.data.files import write_atomic
from mmicl_core.errors import BankError

__all__ = ["Bank", "Demonstration", "Fused", "Pack", "PackEntry", "UnknownPackError"]

FORMAT = 2
HEADER = "pack"
# Ids come from clients and become file names.
ID_PATTERN = re.compile(r"pack-[0-9a-f]{32}")

Fused = np.ndarray[Any, np.dtype[np.float32]]


class UnknownPackError(BankError):
    """The bank holds no pack of that id."""


@dataclass(frozen=True)
class Demonstration:
    """Pictures, as encoded, with a question and its answer."""

    images: tuple[bytes, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class PackEntry:
    """What a pack costs in a prompt, one number for each demonstration."""

    id: str
    tokens_full: tuple[int, ...]
    """Visual and text tokens of the demonstration written out."""
    tokens_fused: tuple[int, ...]
    """Fused tokens in its place."""


@dataclass(frozen=True)
class Pack:
    """A pack with its fused tokens, (T, D) for each demonstration."""

    entry: PackEntry
    fused: tuple[Fused, ...]


class Bank:
    """The packs of one folder that fit one backbone and one adapter.

    Args:
        folder: made with the first pack; several processes may share it.
        backbone: identity of the frozen model.
        template: how the model's turns are written.
        adapter: fingerprint of the trained projection.
    """

    def __init__(self, folder: Path, *, backbone: str, template: str, adapter: str) -> None:
        self._folder = folder
        self._maker = {
            "format": FORMAT,
            "backbone": backbone,
            "template": template,
            "adapter": adapter,
        }

    def name(self, demonstrations: Sequence[Demonstration]) -> str:
        """The id of a pack; equal for equal content, whenever it is made."""
        digest = hashlib.sha256(json.dumps(self._maker, sort_keys=True).encode())
        for demonstration in demonstrations:
            words = (demonstration.question.encode(), demonstration.answer.encode())
            count = len(demonstration.images).to_bytes(8, "big")
            for part in (count, *demonstration.images, *words):
                # The length keeps "ab" + "c" apart from "a" + "bc".
                digest.update(len(part).to_bytes(8, "big") + part)
        return f"pack-{digest.hexdigest()[:32]}"

    def put(
        self, demonstrations: Sequence[Demonstration], fused: Sequence[Fused], tokens_full: Sequence[int]
    ) -> PackEntry:
        """Store a pack, over an equal one if there is one.

        Args:
            fused: (T, D) for each demonstration.
            tokens_full: what each demonstration costs when written out.

        Raises:
            BankError: there is nothing to store, or numbers that are not finite.
        """
        if not demonstrations:
            raise BankError("a pack of no demonstrations cannot be stored: give one or more")
        for number, array in enumerate(fused):
            if not np.isfinite(array).all():
                raise BankError(
                    f"the fused tokens of demonstration {number} are not finite: the backbone or the "
                    "adapter overflows at its precision"
                )
        entry = PackEntry(self.name(demonstrations), tuple(tokens_full), tuple(len(array) for array in fused))
        arrays = {str(number): np.ascontiguousarray(array) for number, array in enumerate(fused)}
        about = self._maker | {
            "tokens_full": entry.tokens_full,
            "tokens_fused": entry.tokens_fused,
            "sha256": _digest(list(arrays.values())),
        }
        write_atomic(self._path(entry.id), save(arrays, metadata={HEADER: json.dumps(about)}))
        return entry

    def describe(self, pack_id: str) -> PackEntry:
        """Token counts of a pack, without its arrays.

        Raises:
            UnknownPackError: there is no such pack.
            BankError: it was made for another model, or its file is damaged.
        """
        return self._read(pack_id, arrays=False).entry

    def load(self, pack_id: str) -> Pack:
        """A pack with its fused tokens, verified.

        Raises:
            UnknownPackError: there is no such pack.
            BankError: it was made for another model, or its file is damaged.
        """
        return self._read(pack_id, arrays=True)

    def _read(self, pack_id: str, *, arrays: bool) -> Pack:
        path = self._path(pack_id)
        if not path.is_file():
            raise UnknownPackError(f"the bank holds no pack {pack_id}: register its demonstrations again")
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads(file.metadata()[HEADER])
                entry = PackEntry(pack_id, tuple(about["tokens_full"]), tuple(about["tokens_fused"]))
                names = [str(number) for number in range(len(entry.tokens_fused))] if arrays else []
                fused = tuple(file.get_tensor(name) for name in names)
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise BankError(
                f"pack {pack_id} is damaged ({error}): register its demonstrations again"
            ) from error
        for key, wanted in self._maker.items():
            if about[key] != wanted:
                raise BankError(
                    f"pack {pack_id} was made for {key} {about[key]}, the server runs {wanted}: "
                    "register its demonstrations again"
                )
        if arrays and _digest(fused) != about["sha256"]:
            raise BankError(
                f"pack {pack_id} is damaged (its fused tokens changed): register its demonstrations again"
            )
        return Pack(entry, fused)

    def _path(self, pack_id: str) -> Path:
        if ID_PATTERN.fullmatch(pack_id) is None:
            raise UnknownPackError(
                f"{pack_id!r} is not the id of a pack, which is `pack-` and 32 hexadecimal digits"
            )
        return self._folder / f"{pack_id}.safetensors"


def _digest(arrays: Sequence[Fused]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()

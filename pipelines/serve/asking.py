"""A question as a generator answers it: what has to be looked at is looked at, apart from the event loop.

Question --> pictures prepared (pool), fused tokens (here, from Ray, from the bank) --> Asked
         <-- Started, Piece, Finished <-- tokens, as the engine tells of them
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mmicl_core.bank import Bank
from mmicl_core.config.serve import ServeConfig
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import DataError
from mmicl_core.methods.base import Method
from mmicl_core.prompts import Turn
from mmicl_core.serving.prefixes import Prefix
from pipelines.serve.contracts import FusedTokens, Fusion, PackReference, Question
from pipelines.serve.errors import RequestError
from pipelines.serve.loaded import Loaded
from pipelines.serve.pictures import prepare_picture

__all__ = ["Asked", "Preparation", "name_of_prefix"]

PREPARING_THREADS = 2

Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked:
    """All that a question needs, in memory."""

    pictures: Mapping[str, PreparedPicture]
    fused: tuple[torch.Tensor, ...]
    saved: int
    """Tokens that demonstrations would take beside what they take, were all of them written out."""


class Preparation:
    """Prepares questions.

    Args:
        config: of the server.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._max_pixels = config.max_image_pixels
        self._bank = Bank(Path(config.bank), memory_bytes=config.bank_memory_bytes)
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, "preparing")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def prepare(
        self, question: Question, loaded: Loaded, method: Method, known: Prefix | None
    ) -> Asked:
        """Look at what has to be looked at: of a question behind what is known, the last turn alone.

        Args:
            method: writes the prompt.

        Raises:
            DataError: a picture cannot be read; says which.
            BankError: the pack is gone, damaged, or of another model.
            RequestError: the model takes no fused demonstrations.
            ObjectLostError: fused tokens are lost with the replica that made them.
        """
        fused: tuple[torch.Tensor, ...] = ()
        fusion = question.fusion
        if fusion is not None:
            _refuse_unless_it_fuses(question, loaded)
            if known is None:
                fused = await self._load(fusion.fused, loaded)
        turns = question.turns if known is None else question.turns[-1:]
        pictures = await self._run(self._look, question.pictures, turns, method)
        return Asked(pictures, fused, _saved(fusion) + _saved_by(method, question.turns, pictures))

    async def _load(self, fused: FusedTokens, loaded: Loaded) -> tuple[torch.Tensor, ...]:
        if isinstance(fused, PackReference):
            pack = await self._run(self._bank.load, fused.tenant, fused.pack_id, loaded.served.maker)
            arrays = pack.fused
        elif isinstance(fused, tuple):
            arrays = fused
        else:
            # Where they died with the replica that made them, Ray's own error tells the ingress, which has
            # them made again.
            arrays = await fused
        width = loaded.method.backbone.width
        for number, array in enumerate(arrays, start=1):
            if array.ndim != 2 or array.shape[1] != width:
                raise DataError(
                    f"fused tokens of demonstration {number} have the shape {array.shape}, the model's have "
                    f"(tokens, {width}): fuse the demonstrations with this model"
                )
        # Arrays that came through Ray's object store, or from the bank, cannot be written to, which torch
        # insists on.
        return tuple(torch.tensor(array) for array in arrays)

    def _look(
        self, images: Mapping[str, bytes], turns: Sequence[Turn], method: Method
    ) -> dict[str, PreparedPicture]:
        wanted = {key for turn in turns for key in turn.pictures}
        pictures = dict[str, PreparedPicture]()
        for number, (key, image) in enumerate(images.items(), start=1):
            if key not in wanted:
                continue
            try:
                pictures[key] = prepare_picture(method.backbone, image, self._max_pixels)
            except DataError as error:
                raise DataError(f"picture {number} of {len(images)}: {error}") from error
        if missing := wanted - pictures.keys():
            raise DataError(f"the question shows {min(missing)!r}, which is none of its pictures")
        return pictures

    async def _run(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def name_of_prefix(question: Question, identity: str) -> str | None:
    """Of what stands before the last turn: equal names, equal content. None where that is nothing, or not
    worth keeping.

    Args:
        identity: of the model.
    """
    if len(question.turns) > 1 and question.prefix is None:
        return None
    fusion = question.fusion.name if question.fusion is not None else None
    parts = (fusion, question.system, question.prefix)
    if all(part is None for part in parts):
        return None
    return hashlib.sha256(repr((identity, *parts)).encode()).hexdigest()


def _refuse_unless_it_fuses(question: Question, loaded: Loaded) -> None:
    if not loaded.served.fuses:
        raise RequestError(
            f"model {question.model} takes no fused demonstrations: ask the model that made them", "model"
        )


def _saved(fusion: Fusion | None) -> int:
    return 0 if fusion is None else sum(fusion.tokens_full) - sum(fusion.tokens_fused)


def _saved_by(method: Method, turns: Sequence[Turn], pictures: Mapping[str, PreparedPicture]) -> int:
    """By a method that makes something else of earlier turns."""
    if method.writes_turns_apart:
        return 0
    return sum(
        Method.demonstration_tokens(method, turn, pictures) - method.demonstration_tokens(turn, pictures)
        for turn in turns[:-1]
    )

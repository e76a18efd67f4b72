"""Deployment: demonstrations -> fused tokens, kept in the bank."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mmicl_core.bank import Bank, Demonstration, Fused, Pack, PackEntry
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import BankError, CheckpointError, DataError
from mmicl_core.methods import load_method
from mmicl_core.methods.adapter import adapter_identity
from mmicl_core.methods.aim import Aim
from mmicl_core.prompts import Turn, count_text
from pipelines.serve.replica import Replica

__all__ = ["Compressor"]

log = logging.getLogger("ray.serve")

# Bounds the memory of one forward pass; the fused tokens do not depend on it.
DEMONSTRATIONS_AT_ONCE = 16


class Compressor(Replica):
    """Reads each demonstration alone and projects what the backbone made of its text.

    Args:
        backbone: folder of the model.
        adapter: folder of the AIM adapter trained for it.
        bank: folder of the packs.
        max_image_pixels: largest picture, decoded.

    Raises:
        CheckpointError: the adapter was trained for another model, or is none of AIM.
    """

    def __init__(self, backbone: Path, adapter: Path, bank: Path, max_image_pixels: int) -> None:
        super().__init__(backbone, max_image_pixels)
        method = load_method(adapter, self.backbone)
        if not isinstance(method, Aim):
            raise CheckpointError(
                f"the adapter in {adapter} is of method {method.config.type!r}, but demonstrations are fused "
                "by 'aim': name the folder of an AIM adapter in serve.adapter"
            )
        self._aim = method
        self._bank = Bank(
            bank,
            backbone=self.backbone.identity,
            template=self.chat.example,
            adapter=adapter_identity(adapter),
        )

    async def register(self, demonstrations: Sequence[Demonstration]) -> PackEntry:
        """Fuse and store; what the bank holds already is not read again.

        Raises:
            DataError: a picture is unreadable, or a text holds control tokens or is too long.
        """
        return await self.in_thread(self._register, demonstrations)

    async def describe(self, pack_id: str) -> PackEntry:
        """Token counts of a pack.

        Raises:
            BankError: it is unknown, damaged, or made for another model.
        """
        return await asyncio.to_thread(self._bank.describe, pack_id)

    async def load(self, pack_id: str) -> Pack:
        """A pack with its fused tokens.

        Raises:
            BankError: it is unknown, damaged, or made for another model.
        """
        return await asyncio.to_thread(self._bank.load, pack_id)

    def _register(self, demonstrations: Sequence[Demonstration]) -> PackEntry:
        try:
            return self._bank.load(self._bank.name(demonstrations)).entry
        except BankError as absence:
            # The name covers the model, so a pack of this name is missing or damaged, never foreign.
            log.info("%s; its demonstrations are here and are fused now", absence)
        fused: list[Fused] = []
        tokens_full: list[int] = []
        for start in range(0, len(demonstrations), DEMONSTRATIONS_AT_ONCE):
            group = demonstrations[start : start + DEMONSTRATIONS_AT_ONCE]
            turns, pictures = self._read(group)
            tokens_full += [self._full_tokens(turn, pictures) for turn in turns]
            fused += self._fuse(turns, pictures)
        return self._bank.put(demonstrations, fused, tokens_full)

    def _read(self, demonstrations: Sequence[Demonstration]) -> tuple[list[Turn], dict[str, PreparedPicture]]:
        turns, images = list[Turn](), dict[str, bytes]()
        for number, demonstration in enumerate(demonstrations):
            keys = tuple(f"{number}.{place}" for place in range(len(demonstration.images)))
            images |= zip(keys, demonstration.images, strict=True)
            turns.append(Turn(keys, demonstration.question, demonstration.answer))
        return turns, self.prepare(images)

    def _full_tokens(self, turn: Turn, pictures: Mapping[str, PreparedPicture]) -> int:
        tokens = count_text(self.chat.turn(turn)) + sum(len(pictures[key].ids) for key in turn.pictures)
        prefix = count_text(self.chat.prefix())
        if prefix + tokens > self.context_length:
            raise DataError(
                f"a demonstration takes {prefix + tokens} tokens, the model reads {self.context_length}: "
                "shorten its question or its answer"
            )
        return tokens

    @torch.no_grad()
    def _fuse(self, turns: Sequence[Turn], pictures: Mapping[str, PreparedPicture]) -> list[Fused]:
        states_TD = self._aim.reader.read(self._aim.reader.pack(turns, pictures))
        return [fused_TD.float().cpu().numpy() for fused_TD in self._aim.fuse_to_keep(states_TD)]

"""Deployment: demonstrations -> fused tokens, kept in the bank."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from mmicl_core.bank import Bank, Demonstration, Fused, Pack, PackEntry
from mmicl_core.errors import BankError, DataError
from mmicl_core.methods.aim import Aggregator, aggregator_identity, read_demonstrations
from mmicl_core.prompts import Turn, count_tokens
from pipelines.serve.replica import Replica

__all__ = ["Compressor"]

log = logging.getLogger("ray.serve")

# Bounds the memory of one forward pass; the fused tokens do not depend on it.
DEMONSTRATIONS_AT_ONCE = 16


class Compressor(Replica):
    """Reads each demonstration alone and projects what the backbone made of its text.

    Args:
        backbone: folder of the model.
        aggregator: folder of the projection trained for it.
        bank: folder of the packs.
        max_image_pixels: largest picture, decoded.

    Raises:
        CheckpointError: the aggregator was trained for another model.
    """

    def __init__(self, backbone: Path, aggregator: Path, bank: Path, max_image_pixels: int) -> None:
        super().__init__(backbone, max_image_pixels)
        self._aggregator = Aggregator.load(aggregator, self.backbone)
        self._bank = Bank(bank, backbone=self.backbone.identity, aggregator=aggregator_identity(aggregator))

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
            tokens_full += [self._full_tokens(_turn(demonstration)) for demonstration in group]
            fused += self._fuse(group)
        return self._bank.put(demonstrations, fused, tokens_full)

    def _full_tokens(self, turn: Turn) -> int:
        tokens, _ = count_tokens(self.chat.turn(turn), self.backbone.visual_tokens)
        prefix, _ = count_tokens(self.chat.prefix(), self.backbone.visual_tokens)
        if prefix + tokens > self.context_length:
            raise DataError(
                f"a demonstration takes {prefix + tokens} tokens, the model reads {self.context_length}: "
                "shorten its question or its answer"
            )
        return tokens

    @torch.no_grad()
    def _fuse(self, demonstrations: Sequence[Demonstration]) -> list[Fused]:
        turns = [_turn(demonstration) for demonstration in demonstrations]
        vision_NVW = self.vision([demonstration.image for demonstration in demonstrations])
        states_TD = read_demonstrations(self.backbone, self.chat, turns, vision_NVW)
        return [self._aggregator(state_TD.float()).cpu().numpy() for state_TD in states_TD]


def _turn(demonstration: Demonstration) -> Turn:
    return Turn("", demonstration.question, demonstration.answer)

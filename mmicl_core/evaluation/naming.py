"""2-way naming of concepts that the model has never seen, by names made up for the episode.

Conditions, on the same queries:
    zero_shot   the query alone: no demonstration tells the names, so no answer can be right
    full        demonstrations with their pictures
    fused       demonstrations as an aggregator's virtual tokens; the query keeps its picture
    swapped     as `full`, with the two names exchanged; scored against the unchanged names, so a model
                that follows its demonstrations scores low
    true_name   the query's picture alone, asked for the name that its concept has: what the model knows
                without being shown
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.train import Condition
from mmicl_core.data.collate import pack
from mmicl_core.data.tasks.caption import NAME_QUESTION
from mmicl_core.methods.aim import Aggregator, fused_prompt, read_demonstrations
from mmicl_core.methods.base import episode_turns, prompt_embeddings
from mmicl_core.methods.lcl import full_prompt
from mmicl_core.prompts import ChatFormat, Turn, count_tokens

__all__ = ["NamingTask"]


class NamingTask:
    """Answers queries greedily under each condition.

    Args:
        aggregator: makes the fused tokens; without one the condition `fused` cannot be asked for.
        max_new_tokens: an answer is cut there.
    """

    def __init__(
        self, backbone: HuggingFaceBackbone, aggregator: Aggregator | None, max_new_tokens: int
    ) -> None:
        self._backbone, self._aggregator = backbone, aggregator
        self._chat = ChatFormat(backbone.processor)
        self._max_new_tokens = max_new_tokens

    def answer(
        self, episodes: Sequence[Mapping[str, Any]], condition: Condition, vision: Mapping[str, Tensor]
    ) -> list[str]:
        """One answer for each EPISODE row; `vision` holds the (V, W) features of every picture."""
        conversations = []
        for episode in episodes:
            *shown, query = episode_turns(episode)
            exchange = dict(zip(episode["names"], reversed(episode["names"]), strict=True))
            if condition == "swapped":
                shown = [replace(turn, answer=exchange[str(turn.answer)]) for turn in shown]
            conversations.append((shown, replace(query, answer=None)))
        if condition == "fused":
            return self._answer_fused(conversations, vision)
        if condition == "zero_shot":
            conversations = [([], query) for _, query in conversations]
        if condition == "true_name":
            conversations = [([], replace(query, question=NAME_QUESTION)) for _, query in conversations]
        prompts = [full_prompt(self._chat, [*shown, query]) for shown, query in conversations]
        pictures = [turn.picture for shown, query in conversations for turn in (*shown, query)]
        return self._generate(prompts, torch.stack([vision[str(key)] for key in pictures]))

    def demonstration_tokens(self, turn: Turn) -> tuple[int, int]:
        """What one demonstration costs in full and fused."""
        return count_tokens(self._chat.turn(turn), self._backbone.visual_tokens)

    def _answer_fused(
        self, conversations: Sequence[tuple[list[Turn], Turn]], vision: Mapping[str, Tensor]
    ) -> list[str]:
        assert self._aggregator is not None
        turns = [turn for shown, _ in conversations for turn in shown]
        features = torch.stack([vision[str(turn.picture)] for turn in turns])
        states_TD = read_demonstrations(self._backbone, self._chat, turns, features)
        fused_TD = [self._aggregator(states) for states in states_TD]
        lengths = iter(len(fused) for fused in fused_TD)
        fused_tokens = [[next(lengths) for _ in shown] for shown, _ in conversations]
        prompts = [fused_prompt(self._chat, len(shown), query) for shown, query in conversations]
        queries = torch.stack([vision[str(query.picture)] for _, query in conversations])
        return self._generate(prompts, queries, fused_TD, fused_tokens)

    def _generate(
        self,
        prompts: Sequence[Any],
        vision_NVW: Tensor,
        fused_TD: Sequence[Tensor] = (),
        fused_tokens: Sequence[Sequence[int]] = (),
    ) -> list[str]:
        packed = pack(
            prompts,
            visual_tokens=self._backbone.visual_tokens,
            fused_tokens=fused_tokens,
            padding_id=self._backbone.tokenizer.pad_token_id,
            side="left",
        ).to(self._backbone.device)
        embeds_BLD = prompt_embeddings(self._backbone, packed, vision_NVW, fused_TD)
        answers = self._backbone.generate(embeds_BLD, packed.mask_BL, self._max_new_tokens)
        return [self._chat.decode(ids) for ids in answers]

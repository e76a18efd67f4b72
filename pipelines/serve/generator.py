"""Deployment: a conversation, with fused demonstrations before it -> text, greedily."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

import torch

from mmicl_core.backbones.decoding import greedy_tokens
from mmicl_core.backbones.language import Embedded
from mmicl_core.backbones.vision import look_up
from mmicl_core.data.collate import pack
from mmicl_core.errors import DataError
from pipelines.serve.contracts import Answer, Question
from pipelines.serve.replica import Replica

__all__ = ["Generator"]

# What a tokenizer gives for a character whose last bytes are in a token to come.
HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Generator(Replica):
    """Answers questions; several at once take turns token by token."""

    async def answer(self, question: Question) -> Answer:
        """The whole answer.

        Raises:
            DataError: a picture is unreadable, a text holds control tokens, or the prompt is too long.
        """
        parts = [part async for part in self.stream(question)]
        whole = parts[-1]
        assert isinstance(whole, Answer)
        return whole

    async def stream(self, question: Question) -> AsyncIterator[str | Answer]:
        """Text as it grows, and the whole answer last. Raises as `answer` does, before the first piece."""
        parts = self._parts(question, arrived=time.perf_counter())
        while (part := await self.in_thread(next, parts, None)) is not None:
            yield part

    def _parts(self, question: Question, arrived: float) -> Iterator[str | Answer]:
        prompt = self._embedded(question)
        ids: list[int] = []
        shown = ""
        ttft_ms = 0.0
        for token in greedy_tokens(self.backbone, prompt, question.max_new_tokens):
            if not ids:
                ttft_ms = _milliseconds_since(arrived)
            ids.append(token)
            text = self.chat.decode(ids)
            if len(text) > len(shown) and not text.endswith(HALF_A_CHARACTER):
                yield text[len(shown) :]
                shown = text
        text = self.chat.decode(ids)
        if len(text) > len(shown):
            yield text[len(shown) :]
        yield Answer(
            text=text,
            finish_reason="length" if len(ids) == question.max_new_tokens else "stop",
            prompt_tokens=prompt.mask_BL.shape[1],
            completion_tokens=len(ids),
            # An answer that ends at once has the end token as its first.
            ttft_ms=ttft_ms or _milliseconds_since(arrived),
        )

    @torch.no_grad()
    def _embedded(self, question: Question) -> Embedded:
        prompt = self.chat.conversation(question.turns, len(question.fused))
        pictures = self.prepare(question.pictures)
        prepared, shown = look_up(question.turns, pictures)
        packed = pack(
            [prompt],
            pictures=prepared,
            fused_tokens=[len(fused) for fused in question.fused],
            padding_id=self.backbone.tokenizer.pad_token_id,
        ).to(self.backbone.device)
        self._refuse_too_long(packed.mask_BL.shape[1], question.max_new_tokens)
        visual = self.backbone.see(shown)
        # Arrays that came through Ray's object store cannot be written to, which torch insists on.
        fused_TD = [torch.tensor(fused, device=self.backbone.device) for fused in question.fused]
        return self.backbone.embed(packed, visual, torch.cat(fused_TD) if fused_TD else None)

    def _refuse_too_long(self, prompt_tokens: int, max_new_tokens: int) -> None:
        if prompt_tokens + max_new_tokens > self.context_length:
            raise DataError(
                f"the prompt takes {prompt_tokens} tokens and the answer may take {max_new_tokens}, the "
                f"model reads {self.context_length}: register the demonstrations as a demo_pack, or lower "
                "max_tokens"
            )


def _milliseconds_since(moment: float) -> float:
    return (time.perf_counter() - moment) * 1000

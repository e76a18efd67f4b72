"""Conversations as prompts: which positions are text, which a picture, which fused tokens.

A model's own chat template decides what stands around a turn. The template is rendered once for a
single turn and once for two equal ones; what the second adds is a turn, what comes before is the
prefix that stands once at the head of every prompt. Every turn is tokenised on its own, so a
demonstration has the same tokens wherever it stands, which is what makes it cacheable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmicl_core.errors import BackboneError, DataError

__all__ = ["IMAGE", "ChatFormat", "Piece", "Prompt", "Turn", "count_tokens", "demonstration_key"]

IMAGE_PLACEHOLDER = "<image>"
IMAGE: Literal["image"] = "image"


@dataclass(frozen=True)
class Turn:
    """One question about one picture (or none); `answer` is None where the model shall give it."""

    picture: str | None
    question: str
    answer: str | None
    scored: bool = False


def demonstration_key(turn: Turn) -> str:
    """Names a demonstration: its picture and its words decide what a model makes of it."""
    return "\t".join((str(turn.picture), turn.question, str(turn.answer)))


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: text with its token ids, one picture, or one demonstration's fused tokens.

    `reference` names the picture, or the number of the demonstration. `scored` marks answer text that
    the loss counts.
    """

    kind: Literal["text", "image", "fused"]
    ids: tuple[int, ...] = ()
    reference: str = ""
    scored: bool = False


Prompt = list[Piece]


def count_tokens(prompt: Prompt, visual_tokens: int) -> tuple[int, int]:
    """Positions of a prompt with all its pictures, and of its text alone, which is what fusing leaves."""
    text = sum(len(piece.ids) for piece in prompt)
    return text + visual_tokens * sum(piece.kind == IMAGE for piece in prompt), text


class ChatFormat:
    """Turns -> pieces, by a processor's chat template.

    Args:
        processor: a Hugging Face processor with a chat template and a tokenizer.

    Raises:
        BackboneError: the template gives a turn that depends on the turns before it.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._image_token = str(getattr(processor, "image_token", IMAGE_PLACEHOLDER))
        once = self._render([Turn("", "q", "a")])
        twice = self._render([Turn("", "q", "a")] * 2)
        turn = twice[len(once) :]
        if not twice.startswith(once) or not turn or not once.endswith(turn):
            raise BackboneError(
                "the chat template writes a second turn differently from the first "
                f"({once!r}, then {turn!r}): demonstrations could not be cached apart"
            )
        self._prefix = once[: len(once) - len(turn)]

    def prefix(self) -> Prompt:
        """What stands once at the head of a prompt: a start token, a system message."""
        return list(self._text(self._prefix)) if self._prefix else []

    def turn(self, turn: Turn) -> Prompt:
        """The pieces of one turn, ending at the answer's place where there is no answer."""
        self._refuse_control_tokens(turn.question)
        whole = self._render([turn])[len(self._prefix) :]
        if turn.answer is None:
            return list(self._pieces(whole, turn.picture))
        self._refuse_control_tokens(turn.answer)
        asked = self._render([Turn(turn.picture, turn.question, None)])[len(self._prefix) :]
        if not whole.startswith(asked):
            raise BackboneError(f"the chat template writes {whole!r}, which does not begin with {asked!r}")
        answer = self._text(whole[len(asked) :], scored=turn.scored)
        return [*self._pieces(asked, turn.picture), *answer]

    def decode(self, ids: Sequence[int]) -> str:
        """Answer ids -> text."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _render(self, turns: Sequence[Turn]) -> str:
        messages = []
        for turn in turns:
            content = [] if turn.picture is None else [{"type": "image"}]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
            if turn.answer is not None:
                answer = [{"type": "text", "text": turn.answer}]
                messages.append({"role": "assistant", "content": answer})
        return str(
            self._processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=turns[-1].answer is None
            )
        )

    def _pieces(self, text: str, picture: str | None) -> Iterator[Piece]:
        before, placeholder, after = text.partition(self._image_token)
        yield from self._text(before)
        if placeholder:
            assert picture is not None
            yield Piece(IMAGE, reference=picture)
            yield from self._text(after)

    def _text(self, text: str, *, scored: bool = False) -> Iterator[Piece]:
        if text:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            yield Piece("text", ids=tuple(ids), scored=scored)

    def _refuse_control_tokens(self, text: str) -> None:
        # Not every tokenizer counts the picture's token among the special ones.
        for token in (self._image_token, *self._tokenizer.all_special_tokens):
            if token in text:
                raise DataError(
                    f"the text {text!r} holds the control token {token}, which would forge a picture "
                    "or a turn: write it differently"
                )

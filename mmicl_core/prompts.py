"""Conversations as prompts: which positions are text, which a picture, which fused tokens.

A model's own chat template decides what stands around a turn. The template is rendered once for a
single turn and once for two equal ones; what the second adds is a turn, what comes before is the
prefix that stands once at the head of every prompt. Every turn is tokenised on its own, so a
demonstration has the same tokens wherever it stands, which is what makes it cacheable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mmicl_core.errors import BackboneError, DataError

__all__ = ["IMAGE", "ChatFormat", "Piece", "Prompt", "Turn", "count_text", "demonstration_key"]

IMAGE: Literal["image"] = "image"


@dataclass(frozen=True)
class Turn:
    """One question about any number of pictures; `answer` is None where the model shall give it."""

    pictures: tuple[str, ...]
    question: str
    answer: str | None
    scored: bool = False


def demonstration_key(turn: Turn) -> str:
    """Names a demonstration: its pictures and its words decide what a model makes of it."""
    return "\t".join((json.dumps(turn.pictures), turn.question, str(turn.answer)))


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


def count_text(prompt: Prompt) -> int:
    """Tokens of a prompt's text alone, which is what fusing leaves of a demonstration."""
    return sum(len(piece.ids) for piece in prompt)


class ChatFormat:
    """Turns -> pieces, by a processor's chat template.

    Args:
        processor: a Hugging Face processor with a tokenizer.
        image_token: stands for a picture in what the template renders.
        template: the Jinja template of turns, for processors that bring none.

    Raises:
        BackboneError: there is no template, or it gives a turn that depends on the turns before it.
    """

    def __init__(self, processor: Any, image_token: str, template: str | None = None) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._image_token = image_token
        self._template = processor.chat_template or template
        if self._template is None:
            raise BackboneError(
                "the model's processor has no chat template, and its family no plain one: save the processor "
                "with the chat_template that the model was trained with"
            )
        # With a picture, or a template that gathers them all at the head would pass.
        once = self._render([Turn(("",), "q", "a")])
        twice = self._render([Turn(("",), "q", "a")] * 2)
        turn = twice[len(once) :]
        if not twice.startswith(once) or not turn or not once.endswith(turn):
            raise BackboneError(
                "the chat template writes a second turn differently from the first "
                f"({once!r}, then {turn!r}): demonstrations could not be cached apart"
            )
        self._prefix = once[: len(once) - len(turn)]
        self.example = once
        """A turn as the template writes it, which tells it from other templates."""

    def prefix(self) -> Prompt:
        """What stands once at the head of a prompt: a start token, a system message."""
        return list(self.text(self._prefix))

    def turn(self, turn: Turn) -> Prompt:
        """The pieces of one turn, ending at the answer's place where there is no answer."""
        self._refuse_control_tokens(turn.question)
        whole = self._render([turn])[len(self._prefix) :]
        if turn.answer is None:
            return list(self._pieces(whole, turn.pictures))
        self._refuse_control_tokens(turn.answer)
        asked = self._render([Turn(turn.pictures, turn.question, None)])[len(self._prefix) :]
        if not whole.startswith(asked):
            raise BackboneError(f"the chat template writes {whole!r}, which does not begin with {asked!r}")
        answer = self.text(whole[len(asked) :], scored=turn.scored)
        return [*self._pieces(asked, turn.pictures), *answer]

    def conversation(self, turns: Sequence[Turn], fused: int = 0) -> Prompt:
        """The prefix, places for the tokens of `fused` demonstrations, and all turns written out."""
        places = [Piece("fused", reference=str(number)) for number in range(fused)]
        return [*self.prefix(), *places, *(piece for turn in turns for piece in self.turn(turn))]

    def cut(self, turn: Turn, most: int) -> tuple[Prompt, bool]:
        """A turn of at most so many text tokens, and whether it was cut: what its question has too many of,
        it loses at the end.

        Raises:
            DataError: the answer and what a template writes take more than that.
        """
        pieces = self.turn(turn)
        excess = count_text(pieces) - most
        if excess <= 0:
            return pieces, False
        ids = self._tokenizer(turn.question, add_special_tokens=False)["input_ids"]
        if excess >= len(ids):
            raise DataError(
                f"a turn takes {most + excess} text tokens, of which {len(ids)} are its question, and {most} "
                "are allowed: allow more"
            )
        # Tokens may join differently where a text is cut, so that it takes another look.
        shorter = self._tokenizer.decode(ids[: len(ids) - excess])
        return self.cut(replace(turn, question=shorter), most)[0], True

    def decode(self, ids: Sequence[int]) -> str:
        """Answer ids -> text."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _render(self, turns: Sequence[Turn]) -> str:
        messages = []
        for turn in turns:
            content: list[dict[str, str]] = [{"type": "image"} for _ in turn.pictures]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
            if turn.answer is not None:
                answer = [{"type": "text", "text": turn.answer}]
                messages.append({"role": "assistant", "content": answer})
        return str(
            self._processor.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=turns[-1].answer is None,
            )
        )

    def _pieces(self, text: str, pictures: tuple[str, ...]) -> Iterator[Piece]:
        first, *others = text.split(self._image_token)
        if len(others) != len(pictures):
            raise BackboneError(
                f"the chat template gives {len(others)} places for {len(pictures)} pictures in {text!r}: it "
                f"must write {self._image_token} once for each"
            )
        yield from self.text(first)
        for picture, after in zip(pictures, others, strict=True):
            yield Piece(IMAGE, reference=picture)
            yield from self.text(after)

    def text(self, text: str, *, scored: bool = False) -> Iterator[Piece]:
        """Text as it is, outside of any turn; nothing where there is none."""
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

"""Conversations as prompts: which positions are text, which a picture, which fused tokens.

A model's own chat template decides what stands around a turn. The template is rendered once for a
single turn and once for two equal ones; what the second adds is a turn, what comes before is the
prefix that stands once at the head of every prompt. Every turn is tokenised on its own, so a
demonstration has the same tokens wherever it stands, which is what makes it cacheable.

    prefix [system message] [places of fused tokens] turn turn turn

Text of others may not hold what a template writes around turns: it would forge one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from mmicl_core.errors import BackboneError, DataError

__all__ = ["IMAGE", "ChatFormat", "Piece", "Prompt", "Turn", "count_text", "demonstration_key", "places"]

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


EXAMPLE = Turn(("",), "q", "a")


def places(fused: int) -> Prompt:
    """Where the tokens of fused demonstrations go."""
    return [Piece("fused", reference=str(number)) for number in range(fused)]


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
        once = self._render([EXAMPLE])
        twice = self._render([EXAMPLE] * 2)
        turn = twice[len(once) :]
        if not twice.startswith(once) or not turn or not once.endswith(turn):
            raise BackboneError(
                "the chat template writes a second turn differently from the first "
                f"({once!r}, then {turn!r}): demonstrations could not be cached apart"
            )
        self._prefix, self._turn = once[: len(once) - len(turn)], turn
        self.example = once
        """A turn as the template writes it, which tells it from other templates."""
        self._control = _control_tokens(self._tokenizer, once)

    def prefix(self, system: str | None = None) -> Prompt:
        """What stands once at the head of a prompt: a start token, a system message.

        Args:
            system: in place of the template's own message, if it has one.

        Raises:
            DataError: the template has no place for it.
        """
        return list(self.text(self._prefix if system is None else self._prefix_with(system)))

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
        return [*self.prefix(), *places(fused), *(piece for turn in turns for piece in self.turn(turn))]

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

    def _prefix_with(self, system: str) -> str:
        self._refuse_control_tokens(system)
        if self._system_content is None:
            raise DataError(
                "the chat template of this model takes no system message: write the instructions into the "
                "first question"
            )
        return self._behind("system", self._system_content(system))

    @cached_property
    def _system_content(self) -> Callable[[str], Any] | None:
        """How a system message is handed to the template; None where it has no place for one, or writes it
        as if somebody had said it."""
        said = "Be brief."
        for content in (_as_parts, str):
            heads = {role: self._behind(role, content(said)) for role in ("system", "user", "assistant")}
            head = heads.pop("system")
            if head.count(said) == 1 and "'text'" not in head and head not in heads.values():
                return content
        return None

    def _behind(self, role: str, content: Any) -> str:
        """What the template writes before the first turn if this message comes first; nothing where it
        refuses the message, or writes the turn differently."""
        first = {"role": role, "content": content}
        try:
            whole = self._apply([first, *_messages([EXAMPLE])], asks=False)
        # Templates refuse by errors of their own making.
        except Exception:
            return ""
        return whole.removesuffix(self._turn) if whole.endswith(self._turn) else ""

    def _render(self, turns: Sequence[Turn]) -> str:
        return self._apply(_messages(turns), asks=turns[-1].answer is None)

    def _apply(self, messages: Sequence[Mapping[str, Any]], *, asks: bool) -> str:
        return str(
            self._processor.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=asks
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
        named = (self._image_token, *self._tokenizer.all_special_tokens)
        found = next((token for token in named if token in text), None)
        if found is None and self._control:
            # As the tokenizer takes it, which may make upper case or wide letters equal.
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            found = next((self._control[token] for token in ids if token in self._control), None)
        if found is not None:
            raise DataError(
                f"the text {text!r} holds the control token {found}, which would forge a picture "
                "or a turn: write it differently"
            )


def _control_tokens(tokenizer: Any, written: str) -> dict[int, str]:
    """Added tokens that no one but a template may write, by number: special ones, and others that it writes.

    Args:
        written: by the template.
    """
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    # What a tokenizer does not know has a token too, but may be said.
    unknown = getattr(tokenizer, "unk_token_id", None)
    return {
        number: str(token)
        for number, token in added.items()
        if number != unknown and str(token).strip() and (token.special or str(token) in written)
    }


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    messages = list[dict[str, Any]]()
    for turn in turns:
        pictures = [{"type": "image"} for _ in turn.pictures]
        messages.append({"role": "user", "content": [*pictures, *_as_parts(turn.question)]})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": _as_parts(turn.answer)})
    return messages


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]

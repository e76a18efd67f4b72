"""Tokens of one answer, as they come -> pieces of its text.

    tokens --decode--> whole characters --stop texts--> what may be told --white space--> pieces

Pieces joined are the answer. Held back are half a character, what may be the beginning of a stop text, and
white space at the end, which no answer begins or ends with. Decoding looks at the last tokens only, so that
the cost of a token does not grow with the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmicl_core.serving.sampling import Likelihood

__all__ = ["TokenTexts", "Told", "Transcript"]

# What a tokenizer gives for bytes that are no whole character, yet.
HALF = "\N{REPLACEMENT CHARACTER}"
# Tokens that are decoded together; a character has at most four.
WINDOW, CONTEXT = 16, 6
LONGEST_WINDOW = 64


@dataclass(frozen=True)
class Told:
    """What may be told after a token."""

    text: str
    likelihoods: tuple[Likelihood, ...]
    """Of the tokens whose text was told until now, those told before left out."""


class Transcript:
    """The text of one answer.

    Args:
        tokenizer: decodes; special tokens have no text.
        stop: texts that end the answer and do not belong to it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._characters = _Characters(tokenizer)
        self._stop = tuple(text for text in stop if text)
        self._held, self._blank = "", ""
        self._begun, self._read, self._passed = False, 0, 0
        self._likelihoods = deque[tuple[int, Likelihood]]()
        self.tokens = 0
        """Of the answer so far, those that made a stop text included."""
        self.stopped = False
        """Whether a stop text came."""

    def add(self, token: int, likelihood: Likelihood | None = None) -> Told:
        """One more token, of an answer that was not `stopped`."""
        self.tokens += 1
        if likelihood is not None:
            self._likelihoods.append((self._read, likelihood))
        return self._take(self._characters.add(token), is_last=False)

    def end(self) -> Told:
        """What was held back, when the answer is over without a stop text."""
        return self._take(self._characters.end(), is_last=True)

    def _take(self, text: str, *, is_last: bool) -> Told:
        self._read += len(text)
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped, sure = True, min(places)
        else:
            sure = len(self._held) if is_last else len(self._held) - self._beginning_of_a_stop()
        passed, self._held = self._held[:sure], "" if self.stopped else self._held[sure:]
        self._passed += len(passed)
        return Told(self._without_blanks(passed), self._likelihoods_until_now(is_last))

    def _beginning_of_a_stop(self) -> int:
        """How much of the end of what is held may become a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0

    def _without_blanks(self, text: str) -> str:
        text = self._blank + text
        if not self._begun:
            text = text.lstrip()
        told = text.rstrip()
        self._begun = self._begun or bool(told)
        self._blank = text[len(told) :]
        return told

    def _likelihoods_until_now(self, is_last: bool) -> tuple[Likelihood, ...]:
        told = list[Likelihood]()
        while self._likelihoods:
            begins, likelihood = self._likelihoods[0]
            # The token has text that was told, or none and nothing is held from before it.
            if not (is_last or begins < self._passed or (begins == self._passed == self._read)):
                break
            self._likelihoods.popleft()
            told.append(likelihood)
        return tuple(told)


class _Characters:
    """Whole characters of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._window, self._told = list[int](), 0

    def add(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        whole = text.rstrip(HALF)
        new, self._told = whole[self._told :], max(self._told, len(whole))
        if len(self._window) >= LONGEST_WINDOW:
            # So many halves make no character.
            return new + self._move(text, by_force=True)
        if len(self._window) >= WINDOW and whole == text:
            self._move(text)
        return new

    def end(self) -> str:
        text = self._decode(self._window)
        new, self._told = text[self._told :], len(text)
        return new

    def _move(self, text: str, *, by_force: bool = False) -> str:
        """Forget tokens that later ones cannot change any more; gives what of their text was not told."""
        for kept in range(CONTEXT, 0, -1):
            tail = self._decode(self._window[-kept:])
            # One that begins inside a character, or changes what stood there, is not like the end of all.
            if tail and text.endswith(tail) and (by_force or not tail.startswith(HALF)):
                forgotten = len(text) - len(tail)
                untold = text[self._told : forgotten]
                self._window, self._told = self._window[-kept:], max(self._told - forgotten, 0)
                return untold
        return ""

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


class TokenTexts:
    """The text of single tokens, as each stands inside of an answer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._known = tokenizer, dict[int, str]()
        # Some tokenizers drop the space before the first token of a text.
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._prefix = str(tokenizer.decode(self._before))

    def text(self, token: int) -> str:
        """Special tokens are written out."""
        if token not in self._known:
            whole = str(self._tokenizer.decode([*self._before, token]))
            alone = whole if whole.startswith(self._prefix) else self._prefix + whole
            self._known[token] = alone[len(self._prefix) :]
        return self._known[token]

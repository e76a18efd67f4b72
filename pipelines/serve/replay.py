"""What is left of an answer that is made a second time, because the replica that made it died."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.serve.contracts import Event, Finished, Piece, Started
from pipelines.serve.errors import UnavailableError

__all__ = ["Replay"]


@dataclass
class _Told:
    """What was passed on of one answer, and how much of it has come again."""

    text: str = ""
    tokens: int = 0
    ended: bool = False
    again: int = 0
    tokens_again: int = 0


class Replay:
    """Passes events on, each once: what comes again after `restart` is left out.

    The text comes again as it was, but maybe in other pieces, so that characters are counted and not pieces.
    """

    def __init__(self) -> None:
        self._started = False
        self._answers: dict[int, _Told] = {}

    def restart(self) -> None:
        """From now on, events come again from the first one."""
        for told in self._answers.values():
            told.again = told.tokens_again = 0

    def rest(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        """Those of `events` that are new.

        Raises:
            UnavailableError: the answer that comes again is another one.
        """
        return tuple(fresh for event in events if (fresh := self._fresh(event)) is not None)

    def _fresh(self, event: Event) -> Event | None:
        match event:
            case Started():
                fresh, self._started = None if self._started else event, True
                return fresh
            case Piece():
                return self._fresh_piece(event)
            case Finished():
                told = self._answers.setdefault(event.index, _Told())
                fresh_end, told.ended = None if told.ended else event, True
                return fresh_end

    def _fresh_piece(self, piece: Piece) -> Piece | None:
        told = self._answers.setdefault(piece.index, _Told())
        known = told.text[told.again : told.again + len(piece.text)]
        tokens_known = min(len(piece.logprobs), told.tokens - told.tokens_again)
        if not piece.text.startswith(known):
            raise UnavailableError(
                "the replica that answered died, and the one asked in its place answers otherwise: ask again"
            )
        told.again += len(piece.text)
        told.tokens_again += len(piece.logprobs)
        fresh = replace(piece, text=piece.text[len(known) :], logprobs=piece.logprobs[tokens_known:])
        told.text += fresh.text
        told.tokens += len(fresh.logprobs)
        is_repeated = fresh != piece and not fresh.text and not fresh.logprobs
        return None if is_repeated else fresh

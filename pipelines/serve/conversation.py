"""A request as turns and pictures.

A `user` message is a question about any number of pictures, an `assistant` message its answer; turns with
an answer are demonstrations. Pictures stand where the model's chat template puts them, before the text,
wherever they stood in the message. `system` and `developer` messages are instructions at the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mmicl_core.bank import Demonstration
from mmicl_core.config.serve import DemonstrationMode, ServeConfig
from mmicl_core.prompts import Turn
from pipelines.serve.errors import RequestError
from pipelines.serve.reading import Pictures
from pipelines.serve.schema import Message
from pipelines.serve.schema_packs import PackDemonstration

__all__ = [
    "Conversation",
    "as_demonstrations",
    "count_fused",
    "prefix_digest",
    "read_conversation",
    "read_demonstrations",
]

INSTRUCTIONS = ("system", "developer")
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Turns, the last one unanswered."""

    system: str | None
    turns: tuple[Turn, ...]
    pictures: Pictures
    """By the references of the turns."""


def read_conversation(messages: Sequence[Message], limits: ServeConfig) -> Conversation:
    """Messages -> turns and their pictures.

    Raises:
        RequestError: messages do not alternate, or a picture is refused.
    """
    head = next((place for place, one in enumerate(messages) if one.role not in INSTRUCTIONS), len(messages))
    system = [_instruction(message, f"messages.{number}") for number, message in enumerate(messages[:head])]
    turns: list[Turn] = []
    pictures = Pictures(limits)
    for number, message in enumerate(messages[head:], head):
        where = f"messages.{number}"
        _refuse_wrong_role(message.role, ROLES[(number - head) % 2], where)
        text = "\n".join(part.text for part in message.content if part.text is not None)
        if message.role == "assistant":
            _refuse_pictures(message, where, "an assistant message")
            turns[-1] = replace(turns[-1], answer=text)
            continue
        keys = []
        for place, part in enumerate(message.content):
            if part.image_url is not None:
                keys.append(f"{number}.{place}")
                pictures.add(keys[-1], part.image_url.url, f"{where}.content.{place}.image_url.url")
        if not text and not keys:
            raise RequestError(f"{where} says nothing: give it a picture or a text", f"{where}.content")
        turns.append(Turn(tuple(keys), text, None))
    if not turns or turns[-1].answer is not None:
        raise RequestError("nothing is asked by the last message: end with a user message", "messages")
    instructions = "\n".join(system) if system else None
    _refuse_much_text(instructions, turns, limits, "messages")
    return Conversation(instructions, tuple(turns), pictures)


def read_demonstrations(
    sent: Sequence[PackDemonstration], limits: ServeConfig
) -> tuple[tuple[Turn, ...], Pictures]:
    """The demonstrations of a pack as answered turns.

    Raises:
        RequestError: a picture is refused.
    """
    turns, pictures = [], Pictures(limits)
    for number, one in enumerate(sent):
        where = f"demonstrations.{number}"
        if one.image is not None:
            pictures.add_base64(f"{number}.0", one.image, f"{where}.image")
        elif one.image_url is not None:
            pictures.add(f"{number}.0", one.image_url.url, f"{where}.image_url.url")
        for place, picture in enumerate(one.images or ()):
            pictures.add(f"{number}.{place}", picture.url, f"{where}.images.{place}.url")
        count = 1 if one.images is None else len(one.images)
        keys = tuple(f"{number}.{place}" for place in range(count))
        turns.append(Turn(keys, one.question, one.answer))
    _refuse_much_text(None, turns, limits, "demonstrations")
    return tuple(turns), pictures


def as_demonstrations(turns: Sequence[Turn], pictures: Mapping[str, bytes]) -> tuple[Demonstration, ...]:
    """Answered turns with the bytes of their pictures."""
    return tuple(
        Demonstration(tuple(pictures[key] for key in turn.pictures), turn.question, turn.answer or "")
        for turn in turns
    )


def count_fused(turns: Sequence[Turn], mode: DemonstrationMode, fuses: bool) -> int:
    """How many of the first turns are to be fused.

    Args:
        fuses: whether the model can.
    """
    earlier = turns[:-1]
    if mode == "fused":
        return len(earlier)
    if mode == "full" or not fuses:
        return 0
    return next((place for place, turn in enumerate(earlier) if not turn.pictures), len(earlier))


def prefix_digest(
    tenant: str, system: str | None, turns: Sequence[Turn], pictures: Mapping[str, bytes]
) -> str:
    """Names what is written before the last turn: equal digests, equal content, and the same tenant, for what
    is known of a prompt tells others what was asked."""
    digest = hashlib.sha256()
    for part in _parts(tenant, system, turns, pictures):
        # The length keeps "ab" + "c" apart from "a" + "bc".
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _parts(
    tenant: str, system: str | None, turns: Sequence[Turn], pictures: Mapping[str, bytes]
) -> Iterator[bytes]:
    yield tenant.encode()
    yield b"" if system is None else b"system"
    yield (system or "").encode()
    for turn in turns:
        yield len(turn.pictures).to_bytes(8, "big")
        yield from (pictures[key] for key in turn.pictures)
        yield turn.question.encode()
        yield (turn.answer or "").encode()


def _refuse_much_text(system: str | None, turns: Sequence[Turn], limits: ServeConfig, where: str) -> None:
    count = len(system or "") + sum(len(turn.question) + len(turn.answer or "") for turn in turns)
    if count > limits.max_text_characters:
        raise RequestError(
            f"{where} hold {count} characters of text, {limits.max_text_characters} are allowed "
            "(serve.max_text_characters): send less",
            where,
        )


def _instruction(message: Message, where: str) -> str:
    _refuse_pictures(message, where, f"a {message.role} message")
    return "\n".join(part.text for part in message.content if part.text is not None)


def _refuse_wrong_role(role: str, expected: str, where: str) -> None:
    if role in INSTRUCTIONS:
        raise RequestError(
            f"{where} is a {role} message behind others: instructions stand at the head, before all messages "
            "of user and assistant",
            f"{where}.role",
        )
    if role != expected:
        raise RequestError(
            f"{where} has role {role!r} where {expected!r} belongs: user and assistant take turns, beginning "
            "and ending with user",
            f"{where}.role",
        )


def _refuse_pictures(message: Message, where: str, what: str) -> None:
    for place, part in enumerate(message.content):
        if part.image_url is not None:
            param = f"{where}.content.{place}.image_url.url"
            raise RequestError(f"{param} is a picture in {what}: pictures belong to user messages", param)

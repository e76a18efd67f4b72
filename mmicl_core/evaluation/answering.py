"""What a model is asked, by content, and what a method around local weights answers.

    task, shown --request_of--> Request --key_of--> name of its answer, whoever asks and when
    requests of a batch --LocalAnswerer--> replies

A request that was answered once need not be asked again: its key covers the model, the words, the bytes of
the pictures and the settings of decoding.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image

from mmicl_core.backbones.decoding import greedy_tokens
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.data.images import PictureError, decode
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import DataError
from mmicl_core.evaluation.controls import BLANK, Shown
from mmicl_core.evaluation.tasks.base import PictureSource, Prediction, Style, Task
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.base import Method
from mmicl_core.prompts import Turn

__all__ = [
    "Answerer",
    "Cost",
    "LocalAnswerer",
    "Reply",
    "Request",
    "key_of",
    "picture_of",
    "request_of",
    "spans",
]


@dataclass(frozen=True)
class Request:
    """One question to a model."""

    turns: tuple[Turn, ...]
    """The query last, without an answer."""
    max_new_tokens: int
    choices: tuple[str, ...] = ()
    """Answers whose log-probabilities are asked for."""
    beams: int = 1
    """Of the search for the answer; 1 is greedy."""

    def to_json(self) -> str:
        """A line that `from_json` reads; the same for the same request."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Request:
        """Read what `to_json` wrote."""
        told = json.loads(line)
        turns = (Turn(**{**turn, "pictures": tuple(turn["pictures"])}) for turn in told["turns"])
        return cls(tuple(turns), told["max_new_tokens"], tuple(told["choices"]), told["beams"])


@dataclass(frozen=True)
class Reply:
    """What was answered."""

    text: str
    prompt_tokens: int | None = None
    """Positions that the prompt took; None where nobody says."""
    log_probabilities: Mapping[str, float] = field(default_factory=dict)

    @property
    def prediction(self) -> Prediction:
        """As a task scores it."""
        return Prediction(self.text, self.log_probabilities)


@dataclass(frozen=True)
class Cost:
    """What one question took, asked by itself; None where it is not known."""

    prompt_tokens: int | None
    kv_bytes: int | None
    """Of the keys and values of the prompt."""
    ttft_ms: float
    """From the question, its pictures decoded, to the first token of the answer."""
    tokens_per_second: float | None
    """Of the answer behind its first token."""


class Answerer(Protocol):
    """Something that answers."""

    def time(self, request: Request, pictures: PictureSource) -> Cost:
        """Ask one question by itself. Raises as `answer`."""
        ...

    def answer(self, requests: Sequence[Request], pictures: PictureSource) -> list[Reply]:
        """One reply for each request.

        Raises:
            DataError: a picture cannot be read.
            BackboneError: a server refused.
        """
        ...


def request_of(task: Task, shown: Shown, style: Style, beams: int = 1) -> Request:
    """A query behind its demonstrations, in the words of a style."""
    query = replace(task.turn(shown.query, style), answer=None)
    first, *others = (*(task.turn(item, style) for item in shown.demonstrations), query)
    opened = replace(first, question=task.opening(style, len(shown.demonstrations)) + first.question)
    return Request((opened, *others), task.most_tokens(style), task.choices(shown.query), beams)


def key_of(request: Request, identity: str, digest: Callable[[str], str]) -> str:
    """The name of an answer.

    Args:
        identity: of the model with all that is around it.
        digest: of the bytes of a picture, by its key.
    """
    turns = []
    for turn in request.turns:
        pictures = [BLANK * _is_blank(key) + digest(key.removeprefix(BLANK)) for key in turn.pictures]
        turns.append([pictures, turn.question, turn.answer])
    told = json.dumps([identity, turns, request.max_new_tokens, request.choices, request.beams])
    return hashlib.sha256(told.encode()).hexdigest()


def _is_blank(key: str) -> bool:
    return key.startswith(BLANK)


def picture_of(key: str, pictures: PictureSource) -> Image.Image:
    """A decoded picture, or the grey one that is shown in its place.

    Raises:
        DataError: it cannot be read or decoded.
    """
    try:
        picture = decode(pictures.read(key.removeprefix(BLANK)))
    except PictureError as error:
        raise DataError(f"picture {key.removeprefix(BLANK)!r}: {error}") from error
    return Image.new("RGB", picture.size, "grey") if _is_blank(key) else picture


def spans(begun: float, moments: Sequence[float]) -> tuple[float, float]:
    """Milliseconds to the first of the moments at which an answer grew, and seconds from there to the last;
    an answer of nothing has arrived now."""
    first = moments[0] if moments else time.perf_counter()
    return 1000 * (first - begun), moments[-1] - first if moments else 0.0


def kv_bytes(backbone: HuggingFaceBackbone, positions: int) -> int | None:
    """Bytes of the keys and values of so many positions; None for an encoder-decoder, whose decoder reads
    what its encoder made."""
    if backbone.family.decoder is not None:
        return None
    config = backbone.text_config
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 2 * len(backbone.layers) * heads * size * backbone.dtype.itemsize * positions


class LocalAnswerer:
    """A method around a local model, a batch at once.

    Args:
        raw: how many of the last demonstrations are written out behind those that AIM fuses.
    """

    def __init__(self, method: Method, raw: int = 0) -> None:
        self._method, self._raw = method, raw

    @torch.no_grad()
    def answer(self, requests: Sequence[Request], pictures: PictureSource) -> list[Reply]:
        """Answers to requests of one number of beams, and the log-probabilities of choices."""
        method = self._method
        prepared = self._prepare(self._decode(requests, pictures))
        prompts = method.embed(self._arrange([request.turns for request in requests], prepared, "left"))
        longest = max(request.max_new_tokens for request in requests)
        answers = method.generate(prompts, longest, requests[0].beams)
        lengths = prompts.mask_BL.sum(1).tolist()
        chosen = self._choices(requests, prepared)
        return [
            Reply(method.chat.decode(ids[: request.max_new_tokens]), length, told)
            for request, ids, length, told in zip(requests, answers, lengths, chosen, strict=True)
        ]

    @torch.no_grad()
    def time(self, request: Request, pictures: PictureSource) -> Cost:
        """Time of a greedy answer, with the language model's own memory."""
        method = self._method
        decoded = self._decode([request], pictures)
        begun = time.perf_counter()
        prepared = self._prepare(decoded)
        prompts = method.embed(self._arrange([request.turns], prepared, "left"))
        moments = list[float]()
        with method.applied(prompts):
            for _ in greedy_tokens(method.backbone, prompts, request.max_new_tokens):
                moments.append(time.perf_counter())
        ttft_ms, later = spans(begun, moments)
        positions = int(prompts.mask_BL.sum())
        return Cost(
            positions,
            kv_bytes(method.backbone, positions),
            ttft_ms,
            (len(moments) - 1) / later if later else None,
        )

    def _decode(self, requests: Sequence[Request], pictures: PictureSource) -> dict[str, Image.Image]:
        keys = dict.fromkeys(key for request in requests for turn in request.turns for key in turn.pictures)
        return {key: picture_of(key, pictures) for key in keys}

    def _prepare(self, decoded: Mapping[str, Image.Image]) -> dict[str, PreparedPicture]:
        prepared = self._method.backbone.prepare(list(decoded.values())) if decoded else []
        return dict(zip(decoded, prepared, strict=True))

    def _arrange(self, conversations: Sequence[Sequence[Turn]], pictures: Any, side: Any) -> Any:
        if isinstance(self._method, Aim):
            raw = [self._raw] * len(conversations)
            return self._method.arrange(conversations, pictures, side, raw=raw)
        return self._method.arrange(conversations, pictures, side)

    def _choices(
        self, requests: Sequence[Request], pictures: Mapping[str, PreparedPicture]
    ) -> list[dict[str, float]]:
        """The log-probability of each choice as the whole answer, summed over its tokens."""
        told = [dict[str, float]() for _ in requests]
        asked = [(place, choice) for place, request in enumerate(requests) for choice in request.choices]
        if not asked:
            return told
        conversations = []
        for place, choice in asked:
            *shown, query = requests[place].turns
            conversations.append([*shown, replace(query, answer=choice, scored=True)])
        batch = self._arrange(conversations, pictures, "right")
        nll = self._method(batch)
        counts = batch.packed.answer_BL.sum(1).tolist()
        for (place, choice), part in zip(asked, torch.split(nll, counts), strict=True):
            told[place][choice] = -float(part.sum())
        return told

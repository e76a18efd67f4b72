"""Requests and responses, named as OpenAI names them, with `demo_pack` and `mmicl` beside them.

What a request may say in OpenAI's API and this server cannot do is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatRequest",
    "Choice",
    "ChunkChoice",
    "ContentPart",
    "Delta",
    "DemoPack",
    "DemoPackRequest",
    "Message",
    "Model",
    "ModelList",
    "PackDemonstration",
    "ResponseMessage",
    "Telemetry",
    "Usage",
]


class Body(BaseModel):
    """JSON that came in or goes out; no field is guessed and none is dropped."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def _only(neutral: float, reason: str) -> AfterValidator:
    def check(value: float | None) -> float | None:
        if value not in (None, neutral):
            raise ValueError(f"only {neutral} is supported, because {reason}: leave it out")
        return value

    return AfterValidator(check)


def _as_object(field: str) -> BeforeValidator:
    def wrap(value: object) -> object:
        return {field: value} if isinstance(value, str) else value

    return BeforeValidator(wrap)


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _known_role(value: str) -> str:
    if value not in ("user", "assistant"):
        raise ValueError(
            f"role {value!r} is not supported, only `user` and `assistant`: put instructions into the "
            "text of a user message"
        )
    return value


GREEDY = "decoding is greedy"


class ImageUrl(Body):
    """A picture as `data:image/TYPE;base64,DATA`."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Read and ignored: the model sees every picture at one resolution."""


class ContentPart(Body):
    """Text or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Self:
        other: Literal["text", "image_url"] = "image_url" if self.type == "text" else "text"
        holds = {"text": self.text is not None, "image_url": self.image_url is not None}
        if not holds[self.type] or holds[other]:
            raise ValueError(f"a part of type {self.type!r} holds the field {self.type!r} and no other")
        return self


class Message(Body):
    """One message; a string as content is one text part."""

    role: Annotated[str, AfterValidator(_known_role)]
    content: Annotated[list[ContentPart], BeforeValidator(_as_parts)] = Field(min_length=1)


class StreamOptions(Body):
    """What a stream ends with."""

    include_usage: bool = False


class ChatRequest(Body):
    """`POST /v1/chat/completions`."""

    model: str
    messages: list[Message] = Field(min_length=1)
    demo_pack: str | None = None
    """A pack of `POST /v1/demo_packs`, put before the conversation."""
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = None
    """Read and ignored: greedy answers do not depend on chance."""
    user: str | None = None
    """Read and ignored."""
    temperature: Annotated[float | None, _only(0, GREEDY)] = None
    top_p: Annotated[float | None, _only(1, GREEDY)] = None
    n: Annotated[int | None, _only(1, GREEDY)] = None
    presence_penalty: Annotated[float | None, _only(0, GREEDY)] = None
    frequency_penalty: Annotated[float | None, _only(0, GREEDY)] = None

    @model_validator(mode="after")
    def _says_a_limit_once(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same: send one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs `stream` to be true")
        return self


class PackDemonstration(Body):
    """A picture, a question about it and the answer."""

    image_url: Annotated[ImageUrl | None, _as_object("url")] = None
    image: str | None = None
    """The picture's file in base64, instead of `image_url`."""
    question: str
    answer: str = Field(min_length=1)

    @model_validator(mode="after")
    def _has_one_picture(self) -> Self:
        if (self.image_url is None) == (self.image is None):
            raise ValueError("a demonstration has one picture: send either image_url or image")
        return self


class DemoPackRequest(Body):
    """`POST /v1/demo_packs`."""

    demonstrations: list[PackDemonstration] = Field(min_length=1)


class DemoPack(Body):
    """Registered demonstrations and what they cost in every prompt, written out and fused."""

    id: str
    object: Literal["demo_pack"]
    demonstrations: int
    tokens_full: int
    tokens_fused: int


class Usage(Body):
    """Tokens of one request."""

    prompt_tokens: int
    """Positions that the model read: text, visual and fused tokens."""
    completion_tokens: int
    total_tokens: int
    demo_tokens_full: int
    """What the pack's demonstrations would have cost, written out; 0 without a pack."""
    demo_tokens_fused: int
    """What they cost, part of `prompt_tokens`."""


class Telemetry(Body):
    """What OpenAI's API has no field for."""

    ttft_ms: float
    """Milliseconds from the arrival at the generator to the first token."""


class ResponseMessage(Body):
    """The answer."""

    role: Literal["assistant"]
    content: str


class Choice(Body):
    """The one answer of a request."""

    index: int
    message: ResponseMessage
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Body):
    """Response of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    mmicl: Telemetry


class Delta(Body):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Body):
    """The one answer of a stream, as far as a chunk knows it."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(Body):
    """One event of a stream. The last but one says why it ended; usage follows where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    mmicl: Telemetry | None = None


class Model(Body):
    """An entry of `GET /v1/models`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Body):
    """Response of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]

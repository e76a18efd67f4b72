"""Chat requests and completions, named as OpenAI names them, with what is our own beside them.

What a request may say in OpenAI's API and this server cannot do is refused, never ignored; the few fields
that change nothing in an answer are listed here and taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mmicl_core.config.serve import DemonstrationMode

__all__ = [
    "Body",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatRequest",
    "Choice",
    "ChunkChoice",
    "ContentPart",
    "Delta",
    "ImageUrl",
    "LikelyToken",
    "Logprobs",
    "Message",
    "PackUse",
    "Picture",
    "PromptTokensDetails",
    "ResponseMessage",
    "Telemetry",
    "TokenLikelihood",
    "Usage",
]

MOST_MESSAGES = 4096
MOST_STOPS, LONGEST_STOP = 4, 256
MOST_LOGPROBS = 20
SEED_BITS = 63
NO_CALLS = "this server calls no functions"
AS_GIVEN = "scores of tokens are used as the model gives them"


class Body(BaseModel):
    """JSON that came in or goes out; no field is guessed and none is dropped."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_serialization_defaults_required=False,
    )


def _zero(value: float | None) -> float | None:
    if value:
        raise ValueError(f"only 0 is supported, because {AS_GIVEN}: leave it out")
    return value


def _not(reason: str) -> BeforeValidator:
    def check(value: object) -> object:
        if value is not None:
            raise ValueError(f"it is not supported, because {reason}: leave it out")
        return value

    return BeforeValidator(check, json_schema_input_type=None)


def _text_only(value: object) -> object:
    if isinstance(value, dict) and value.get("type") in ("json_object", "json_schema"):
        raise ValueError(
            f"type {value['type']!r} is not supported, because nothing here forces an answer to be JSON: "
            "leave it out and ask for JSON in the prompt"
        )
    return value


def _as_object(field: str, plain: Any, kind: Any) -> BeforeValidator:
    def wrap(value: object) -> object:
        return {field: value} if isinstance(value, str) else value

    return BeforeValidator(wrap, json_schema_input_type=plain | kind)


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


# Told and not checked here: where it is read, the reason for a refusal is clearer.
Url = Annotated[str, Field(json_schema_extra={"pattern": "^([Dd][Aa][Tt][Aa]:|[Hh][Tt][Tt][Pp][Ss]?://)"})]


class ImageUrl(Body):
    """A picture."""

    url: Url
    """`data:image/TYPE;base64,DATA` of a PNG, JPEG, WebP, GIF or BMP, or an http(s) address on a host that
    this server may load pictures from."""
    detail: Literal["auto", "low", "high"] | None = None
    """Read and ignored: the model sees every picture at one resolution."""


Picture = Annotated[ImageUrl, _as_object("url", Url, ImageUrl)]
"""An `ImageUrl`, or its `url` alone."""


class ContentPart(Body):
    """Text or a picture."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "properties": {"type": {"const": kind}, other: {"type": "null"}},
                    "required": [kind],
                }
                for kind, other in (("text", "image_url"), ("image_url", "text"))
            ]
        }
    )

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Picture | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Self:
        other: Literal["text", "image_url"] = "image_url" if self.type == "text" else "text"
        holds = {"text": self.text is not None, "image_url": self.image_url is not None}
        if not holds[self.type] or holds[other]:
            raise ValueError(f"a part of type {self.type!r} holds the field {self.type!r} and no other")
        return self


Parts = Annotated[list[ContentPart], Field(min_length=1)]


class Message(Body):
    """One message; a string as content is one text part.

    `system` and `developer` messages are instructions and stand at the head. A `user` message is a question
    about any number of pictures, an `assistant` message its answer.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Parts, BeforeValidator(_as_parts, json_schema_input_type=str | Parts)]
    refusal: None = None
    """An answer of this server that is sent back may hold it."""
    annotations: list[None] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(Body):
    """What a stream ends with."""

    include_usage: bool | None = False
    """Whether a last chunk, without choices, holds `usage`."""
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Body):
    """Of answers: text, and nothing that would have to be enforced."""

    type: Literal["text"]


class PackUse(Body):
    """A pack, or the demonstrations of it that are nearest to the pictures of the last message."""

    id: str
    select: int | None = Field(default=None, ge=1)
    """How many; the nearest one stands last. None takes all, in their order."""


StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[StopText], Field(max_length=MOST_STOPS)]
Penalty = Annotated[float | None, AfterValidator(_zero), Field(json_schema_extra={"enum": [0, None]})]


def _needs(field: str, kind: str, flag: str) -> dict[str, Any]:
    """In a schema: a field that is there needs another one to be true."""
    return {
        "if": {"required": [field], "properties": {field: {"type": kind}}},
        "then": {"required": [flag], "properties": {flag: {"const": True}}},
    }


LIMITS_OF_TOKENS = ("max_tokens", "max_completion_tokens")


class ChatRequest(Body):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "required": list(LIMITS_OF_TOKENS),
                "properties": {name: {"type": "integer"} for name in LIMITS_OF_TOKENS},
            },
            "allOf": [
                _needs("stream_options", "object", "stream"),
                _needs("top_logprobs", "integer", "logprobs"),
            ],
        }
    )

    model: str
    """The base model, or `BASE@ADAPTER`, as `GET /v1/models` lists them."""
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    demonstrations: DemonstrationMode | None = None
    """What becomes of turns before the last question: `full` writes them out, `fused` fuses them all, `auto`
    fuses those with pictures that come first, where the model can. The server's settings say what is done
    without it."""
    demo_pack: Annotated[PackUse | None, _as_object("id", str, PackUse | None)] = None
    """A pack of `POST /v1/demo_packs`, put before the conversation; a string is its id."""
    timeout_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Until the request ends with 504, where that is sooner than the server's own limit."""
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    """The same as `max_tokens`; send one of them."""
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    """0, the default, takes the likeliest token."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(default=None, ge=1)
    """Answers; the server's settings bound it."""
    stop: Annotated[
        Stops | None, BeforeValidator(_as_list, json_schema_input_type=StopText | Stops | None)
    ] = None
    """Texts that end an answer and do not belong to it: one, or up to four."""
    ignore_eos: bool | None = None
    """Answers of `max_tokens`, none shorter but for `stop`, as load tests want them."""
    seed: int | None = Field(default=None, ge=-(2**SEED_BITS), lt=2**SEED_BITS)
    """Equal seeds, equal answers, as long as the model is the same."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    """How many of the likeliest tokens are told with each token; needs `logprobs`."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Annotated[
        ResponseFormat | None, BeforeValidator(_text_only, json_schema_input_type=ResponseFormat | None)
    ] = None
    modalities: list[Literal["text"]] | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    store: Literal[False] | None = None
    tools: Annotated[None, _not(NO_CALLS)] = None
    tool_choice: Annotated[None, _not(NO_CALLS)] = None
    parallel_tool_calls: Annotated[None, _not(NO_CALLS)] = None
    functions: Annotated[None, _not(NO_CALLS)] = None
    function_call: Annotated[None, _not(NO_CALLS)] = None
    logit_bias: Annotated[None, _not(AS_GIVEN)] = None
    audio: Annotated[None, _not("answers are text")] = None
    prediction: Annotated[None, _not("nothing here takes a guess at the answer")] = None
    reasoning_effort: Annotated[None, _not("the models here do not reason apart")] = None
    verbosity: Annotated[None, _not("the prompt alone decides how long answers are")] = None
    web_search_options: Annotated[None, _not("this server searches nothing")] = None
    user: str | None = None
    """Read and ignored, like the four fields that follow."""
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same: send one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs `stream` to be true")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs `logprobs` to be true")
        return self


class LikelyToken(Body):
    """A token that was likely."""

    token: str
    logprob: float
    """Natural logarithm; -9999 stands for what is next to impossible."""
    bytes: list[int] | None
    """Of `token`, in UTF-8; null where the token is a part of a character."""


class TokenLikelihood(LikelyToken):
    """A token of an answer."""

    top_logprobs: list[LikelyToken]


class Logprobs(Body):
    """How likely the tokens of an answer were."""

    content: list[TokenLikelihood]
    refusal: None


class PromptTokensDetails(Body):
    """What the prompt's tokens were."""

    cached_tokens: int
    """Read before, for another request."""


class Usage(Body):
    """Tokens of one request."""

    prompt_tokens: int
    """Positions that the model read: text, visual and fused tokens."""
    completion_tokens: int
    """Of all answers."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    cached_tokens: int
    """Part of `prompt_tokens`: read before, for another request."""
    demo_tokens_full: int
    """What demonstrations - earlier turns and a pack - would have cost, all of them written out."""
    demo_tokens_fused: int
    """What they cost as they are, part of `prompt_tokens`."""


class Telemetry(Body):
    """What OpenAI's API has no field for."""

    ttft_ms: float
    """Milliseconds from the arrival at the generator to the first token of the answer."""
    queued_ms: float
    """Of these, until the prompt began to be read."""


class ResponseMessage(Body):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(Body):
    """One of the answers."""

    index: int
    message: ResponseMessage
    logprobs: Logprobs | None
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
    """One of the answers, as far as a chunk knows it."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(Body):
    """One event of a stream. The last of an answer says why it ended; then comes usage, where it was asked
    for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    """In the last chunk, and null in others, where it was asked for."""
    mmicl: Telemetry | None = None
    """In chunks that end an answer, and in the last one."""

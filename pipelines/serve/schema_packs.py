"""Packs of demonstrations, models, embeddings and errors, as JSON."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from pipelines.serve.schema import Body, Picture

__all__ = [
    "DeletedPack",
    "DemoPack",
    "DemoPackList",
    "DemoPackRequest",
    "Embedding",
    "EmbeddingList",
    "EmbeddingRequest",
    "EmbeddingUsage",
    "ErrorBody",
    "ErrorDetails",
    "Model",
    "ModelList",
    "PackDemonstration",
    "PictureInput",
]

MOST_DEMONSTRATIONS = 4096


class PackDemonstration(Body):
    """Pictures, a question about them and the answer. The pictures come in one of three fields."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [field], "properties": {field: {"not": {"type": "null"}}}}
                for field in ("image_url", "image", "images")
            ]
        }
    )

    image_url: Picture | None = None
    image: str | None = None
    """The file of one picture in base64."""
    images: list[Picture] | None = Field(default=None, min_length=1)
    """Several pictures, each as `image_url`."""
    question: str
    answer: str = Field(min_length=1)

    @model_validator(mode="after")
    def _has_pictures(self) -> Self:
        if sum(field is not None for field in (self.image_url, self.image, self.images)) != 1:
            raise ValueError("a demonstration has its pictures in one field: image_url, image or images")
        return self


class DemoPackRequest(Body):
    """`POST /v1/demo_packs`."""

    model: str | None = None
    """Fuses the demonstrations; may be left out where one model alone can."""
    demonstrations: list[PackDemonstration] = Field(min_length=1, max_length=MOST_DEMONSTRATIONS)
    timeout_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Until the request ends with 504, where that is sooner than the server's own limit."""


class DemoPack(Body):
    """Registered demonstrations and what they cost in every prompt, written out and fused."""

    id: str
    object: Literal["demo_pack"]
    model: str
    """That chat requests with this pack are for."""
    created: int
    """Unix seconds."""
    demonstrations: int
    tokens_full: int
    tokens_fused: int


class DemoPackList(Body):
    """Response of `GET /v1/demo_packs`: all of the tenant, newest first."""

    object: Literal["list"]
    data: list[DemoPack]


class DeletedPack(Body):
    """Response of `DELETE /v1/demo_packs/{pack_id}`."""

    id: str
    object: Literal["demo_pack"]
    deleted: Literal[True]


class Model(Body):
    """A model that requests may name: the base, or the base with an adapter."""

    id: str
    object: Literal["model"]
    created: int
    """Unix seconds at which this server began to list it."""
    owned_by: str
    method: str
    """That the adapter was trained by, `base` without one."""
    fuses: bool
    """Whether it turns demonstrations into fused tokens."""
    context_length: int
    """Most tokens of a prompt and its answer."""


class ModelList(Body):
    """Response of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class PictureInput(Body):
    """A picture to embed."""

    type: Literal["image_url"] | None = None
    image_url: Picture


def _as_inputs(value: object) -> object:
    inputs = value if isinstance(value, list) else [value]
    for place, one in enumerate(inputs):
        # Only a field of its own makes an address a picture: alone, it is a text.
        if isinstance(one, str) and one[:5].lower() != "data:":
            raise ValueError(
                f"text {place} ({one[:40]!r}) cannot be embedded, only pictures can: send a data URI, or "
                'an object {"image_url": {"url": ...}}'
            )
    return [{"image_url": one} if isinstance(one, str) else one for one in inputs]


OneInput = Annotated[str, Field(pattern="^[Dd][Aa][Tt][Aa]:")] | PictureInput


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: str
    """Any that is served: pictures are seen by the backbone that all of them share."""
    input: Annotated[
        list[PictureInput],
        BeforeValidator(
            _as_inputs,
            json_schema_input_type=OneInput | Annotated[list[OneInput], Field(min_length=1)],
        ),
    ] = Field(min_length=1)
    """Pictures: one, or a list; a string is a data URI."""
    encoding_format: Literal["float", "base64"] | None = None
    """`base64` is that of little-endian float32 numbers; `float` is the default."""
    dimensions: None = None
    """Vectors are as long as the backbone makes them."""
    user: str | None = None
    """Read and ignored."""


class Embedding(Body):
    """The vector of one picture, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Body):
    """Visual tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Body):
    """Response of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ErrorDetails(Body):
    """What is wrong, and what to do."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    """The field at fault."""
    code: str


class ErrorBody(Body):
    """Every response that is an error."""

    error: ErrorDetails

"""The API's own description, OpenAPI 3.1: what every route takes, gives, and how it fails.

Bodies are read by hand, so that FastAPI does not know of them: a route names the model of its body here, and
every status that it can answer with. What the middleware can answer is added to all routes.
"""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pipelines.serve.middleware import OPEN
from pipelines.serve.schema import ChatCompletionChunk, ChatRequest
from pipelines.serve.schema_packs import DemoPackRequest, EmbeddingRequest, ErrorBody
from pipelines.serve.services import Services

__all__ = ["BINARY", "add_document", "answers", "binary_body", "body", "stream_of"]

BINARY = "application/octet-stream"
REFERENCE = "#/components/schemas/{model}"
TITLE, VERSION = "mmicl", "1"
ABOUT = (
    "OpenAI's chat completions, models and embeddings, for multimodal models that read demonstrations as "
    "fused tokens, and packs of such demonstrations."
)
AUTOMATIC_STATUS = "422"
"""FastAPI's own, for parameters that do not fit; here all of them are text."""
AUTOMATIC_SCHEMAS = ("HTTPValidationError", "ValidationError")
FAILURES = {
    400: "The request is not as it must be; `param` names the field.",
    401: "No API key, or one that is not known.",
    404: "No such model or pack.",
    408: "The body did not come in time.",
    409: "The pack is damaged, of another model, or one too many.",
    413: "The body is too large.",
    415: "The body is declared as something else.",
    429: "Too many requests of this key, or of all.",
    500: "The server's fault.",
    503: "No replica can answer now.",
    504: "The request took too long.",
}
LATER = (429, 503)


def answers(
    model: type[BaseModel] | None, *failures: int, also: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Options of a route that answers with a model.

    Args:
        model: None answers with bytes.
        failures: statuses of errors, but for those that every route can answer with.
        also: other media types of the answer.
    """
    content = {BINARY: {"schema": {"type": "string", "format": "binary"}}} if model is None else (also or {})
    fine: dict[str, Any] = {"description": "Done."} | ({"content": content} if content else {})
    if model is not None:
        fine["model"] = model
    failed = {
        status: {"model": ErrorBody, "description": FAILURES[status]} for status in (*failures, 413, 500)
    }
    return {"response_class": Response, "responses": {200: fine} | dict(sorted(failed.items()))}


def stream_of(model: type[BaseModel]) -> dict[str, Any]:
    """The media type of a stream of events, each of them a model."""
    return {
        "text/event-stream": {
            "schema": {
                "type": "string",
                "description": f"Events `data: JSON`, each a {model.__name__}, or an ErrorBody, which is the "
                "last one; without an error, `data: [DONE]` is.",
            },
            "x-itemSchema": {"$ref": REFERENCE.format(model=model.__name__)},
        }
    }


def body(model: type[BaseModel]) -> dict[str, Any]:
    """What a route adds to its description whose body is a model, as JSON."""
    reference = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def binary_body(description: str) -> dict[str, Any]:
    """What a route adds to its description whose body is bytes."""
    content = {BINARY: {"schema": {"type": "string", "format": "binary"}}}
    return {"requestBody": {"required": True, "description": description, "content": content}}


def add_document(app: FastAPI, services: Services) -> None:
    """Serve the document at `/openapi.json`. It is made when somebody asks for it."""

    @cache
    def document() -> dict[str, Any]:
        return _document(app, services)

    app.openapi = document  # type: ignore[method-assign]

    @app.get("/openapi.json", tags=["operations"], response_class=JSONResponse)
    async def describe_api() -> dict[str, Any]:
        """This document."""
        return document()


def _document(app: FastAPI, services: Services) -> dict[str, Any]:
    made = get_openapi(title=TITLE, version=VERSION, description=ABOUT, routes=app.routes)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for name in AUTOMATIC_SCHEMAS:
        schemas.pop(name, None)
    schemas |= _schemas()
    limited = services.config.requests_per_minute or services.config.requests_at_once
    common = [500, *([401] if services.keys.required else []), *([413, 429] if limited else [413])]
    for path, operations in made["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop(AUTOMATIC_STATUS, None)
            for status in () if path in OPEN else common:
                responses.setdefault(str(status), _failure(status))
            for status, response in responses.items():
                response["headers"] = _headers(int(status))
            operation["responses"] = dict(sorted(responses.items()))
            if path in OPEN:
                operation["security"] = []
    if services.keys.required:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _schemas() -> dict[str, Any]:
    """Of what FastAPI does not see: bodies of requests, and events."""
    _, requests = models_json_schema(
        [(model, "validation") for model in (ChatRequest, DemoPackRequest, EmbeddingRequest)],
        ref_template=REFERENCE,
    )
    _, responses = models_json_schema(
        [(model, "serialization") for model in (ChatCompletionChunk, ErrorBody)], ref_template=REFERENCE
    )
    found: dict[str, Any] = {**requests["$defs"], **responses["$defs"]}
    return found


def _failure(status: int) -> dict[str, Any]:
    schema = {"$ref": REFERENCE.format(model=ErrorBody.__name__)}
    return {"description": FAILURES[status], "content": {"application/json": {"schema": schema}}}


def _headers(status: int) -> dict[str, Any]:
    headers = {"x-request-id": {"description": "Names the request in the log.", "schema": {"type": "string"}}}
    if status in LATER:
        seconds = {"type": "integer", "minimum": 1}
        headers["retry-after"] = {"description": "Seconds until another try.", "schema": seconds}
    if status == HTTPStatus.CONFLICT:
        again = {"type": "string", "const": "false"}
        headers["x-should-retry"] = {"description": "Another try is of no use.", "schema": again}
    return headers

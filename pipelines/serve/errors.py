"""Errors as OpenAI writes them; one table says which error is which status."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from mmicl_core.bank import UnknownPackError
from mmicl_core.errors import BankError, DataError, MmiclError

__all__ = [
    "DeadlineError",
    "OverloadedError",
    "RateLimitError",
    "RequestError",
    "RetryError",
    "SlowUploadError",
    "TooLargeError",
    "UnavailableError",
    "UnknownKeyError",
    "UnknownModelError",
    "error_body",
    "explain_request",
    "install_error_handlers",
    "status_of",
]

log = logging.getLogger("ray.serve")

INPUT_SHOWN = 60


class RequestError(DataError):
    """A request that cannot be served; `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[RequestError], tuple[Any, ...]]:
        # Exceptions are pickled by their message alone, on their way from a replica.
        return type(self), (str(self), self.param)


class TooLargeError(RequestError):
    """More bytes than the server takes."""


class SlowUploadError(RequestError):
    """A body that did not come in time."""


class UnknownModelError(RequestError):
    """A model that is not served here."""


class UnknownKeyError(RequestError):
    """No API key, or one that is not known."""


class RetryError(RequestError):
    """A request that may succeed later.

    Args:
        retry_after: seconds until it is worth another try.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[RequestError], tuple[Any, ...]]:
        return type(self), (str(self), self.retry_after)


class RateLimitError(RetryError):
    """More requests than a key may send."""


class OverloadedError(RetryError):
    """More requests than may wait."""


class UnavailableError(RetryError):
    """No replica could answer."""


class DeadlineError(RequestError):
    """A request that took longer than it may."""


STATUS: Mapping[type[Exception], tuple[HTTPStatus, str]] = {
    UnknownKeyError: (HTTPStatus.UNAUTHORIZED, "invalid_api_key"),
    TooLargeError: (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request_too_large"),
    SlowUploadError: (HTTPStatus.REQUEST_TIMEOUT, "request_timeout"),
    RateLimitError: (HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_exceeded"),
    OverloadedError: (HTTPStatus.TOO_MANY_REQUESTS, "server_overloaded"),
    UnavailableError: (HTTPStatus.SERVICE_UNAVAILABLE, "no_replica"),
    DeadlineError: (HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded"),
    UnknownModelError: (HTTPStatus.NOT_FOUND, "model_not_found"),
    UnknownPackError: (HTTPStatus.NOT_FOUND, "demo_pack_not_found"),
    BankError: (HTTPStatus.CONFLICT, "demo_pack_unusable"),
    DataError: (HTTPStatus.BAD_REQUEST, "invalid_value"),
}
"""The nearest class of an error decides. What is not here is the server's fault."""


def status_of(error: Exception) -> tuple[HTTPStatus, str]:
    """Status and code of an error."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error"


def error_body(error: Exception) -> dict[str, Any]:
    """An error in OpenAI's shape. What is the server's fault is logged and not told."""
    status, code = status_of(error)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("a request failed", exc_info=error)
        return _body("the server failed on this request; its log says why", status, code, None)
    param = error.param if isinstance(error, RequestError) else None
    return _body(str(error), status, code, param)


def explain_request(error: ValidationError) -> RequestError:
    """The first problem of a body that does not fit its model, as one sentence."""
    problem = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in problem["loc"]) or None
    where = param or "the request"
    if problem["type"] == "extra_forbidden":
        return RequestError(f"{where} is not supported: leave it out", param)
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if problem["type"] in ("missing", "value_error") else f" (found {_shorten(problem['input'])})"
    return RequestError(f"{where}: {message}{found}", param)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error answer of `app` one in OpenAI's shape."""

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(error), status_of(error)[0])

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = status.phrase.lower().replace(" ", "_")
        return JSONResponse(_body(message, status, code, None), status, error.headers)

    app.add_exception_handler(MmiclError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)


def _body(message: str, status: HTTPStatus, code: str, param: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= INPUT_SHOWN else f"{text[:INPUT_SHOWN]}..."

"""Errors as OpenAI writes them; one table says which error is which status."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from mmicl_core.bank import FullBankError, UnknownPackError
from mmicl_core.errors import BankError, DataError, MmiclError

__all__ = [
    "CLIENT_GONE",
    "ClientGoneError",
    "DeadlineError",
    "MediaTypeError",
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
    "error_headers",
    "explain_request",
    "install_error_handlers",
    "status_of",
]

log = logging.getLogger("ray.serve")

INPUT_SHOWN = 60
LONGEST_PARAM = 200
LONGEST_MESSAGE = 2000
CLIENT_GONE = 499
"""The status of an answer that nobody waits for, as servers write it into their logs."""


class ClientGoneError(Exception):
    """Whoever asked has hung up."""


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


class MediaTypeError(RequestError):
    """A body that does not say that it is what belongs there."""


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
    MediaTypeError: (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
    SlowUploadError: (HTTPStatus.REQUEST_TIMEOUT, "request_timeout"),
    RateLimitError: (HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_exceeded"),
    OverloadedError: (HTTPStatus.TOO_MANY_REQUESTS, "server_overloaded"),
    UnavailableError: (HTTPStatus.SERVICE_UNAVAILABLE, "no_replica"),
    DeadlineError: (HTTPStatus.GATEWAY_TIMEOUT, "deadline_exceeded"),
    UnknownModelError: (HTTPStatus.NOT_FOUND, "model_not_found"),
    UnknownPackError: (HTTPStatus.NOT_FOUND, "demo_pack_not_found"),
    FullBankError: (HTTPStatus.CONFLICT, "demo_bank_full"),
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
    """An error in OpenAI's shape. What nobody expected is logged and not told."""
    status, code = status_of(error)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("a request failed", exc_info=error)
        return _body("the server failed on this request; its log says why", status, code, None)
    param = error.param if isinstance(error, RequestError) else None
    return _body(_shorten(str(error), LONGEST_MESSAGE), status, code, param)


def error_headers(error: Exception) -> dict[str, str]:
    """What clients do by: who to be, when to come again, and when that is of no use."""
    if isinstance(error, UnknownKeyError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, RetryError):
        # In whole seconds, and never too early.
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if status_of(error)[0] == HTTPStatus.CONFLICT:
        # OpenAI's clients take this status for a lock, and would try again.
        return {"x-should-retry": "false"}
    return {}


def explain_request(error: ValidationError) -> RequestError:
    """The first problem of a body that does not fit its model, as one sentence."""
    problem = error.errors(include_url=False)[0]
    # A field that nobody knows may have a name of any length.
    param = _shorten(".".join(str(part) for part in problem["loc"]), LONGEST_PARAM) or None
    where = param or "the request"
    if problem["type"] == "extra_forbidden":
        return RequestError(f"{where} is not supported: leave it out", param)
    message = problem["msg"].removeprefix("Value error, ")
    found = (
        ""
        if problem["type"] in ("missing", "value_error")
        else f" (found {_shorten(repr(problem['input']))})"
    )
    return RequestError(f"{where}: {message}{found}", param)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error answer of `app` one in OpenAI's shape."""

    async def on_error(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(error), status_of(error)[0], error_headers(error))

    async def on_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = status.phrase.lower().replace(" ", "_")
        body = _body(_shorten(message, LONGEST_MESSAGE), status, code, None)
        return JSONResponse(body, status, error.headers)

    app.add_exception_handler(MmiclError, on_error)
    app.add_exception_handler(ClientGoneError, on_gone)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)


def _body(message: str, status: HTTPStatus, code: str, param: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _shorten(text: str, most: int = INPUT_SHOWN) -> str:
    return text if len(text) <= most else f"{text[:most]}..."

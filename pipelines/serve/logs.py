"""One line of JSON for each request: who asked for what kind of thing, and how it went.

Never what was asked or answered, and never a key: prompts are private, and logs go to many places.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass

__all__ = ["RequestLine", "write_line"]

log = logging.getLogger("ray.serve")


@dataclass
class RequestLine:
    """What the log says of a request; what is None is left out."""

    request_id: str
    method: str
    tenant: str | None = None
    """None where no key is needed, or none was known."""
    route: str = "unknown"
    """Its template, which has no text of the caller."""
    status: int = 499
    """499: the client had gone before there was an answer."""
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    model: str | None = None
    ttft_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    complete: bool = False
    """Whether the answer was sent to its end."""


def write_line(line: RequestLine) -> None:
    """Log a request that is over."""
    told = {name: value for name, value in asdict(line).items() if value is not None}
    log.info("%s", json.dumps({"event": "request"} | told))

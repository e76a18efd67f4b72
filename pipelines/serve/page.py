"""The playground at `/`: files of the package, served as they are. It asks nobody but this server.

Hazard: names of demonstrations and answers of models are hostile text. The page writes text and never
markup, and its policy forbids what would run or load anything else, should one slip through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

from mmicl_core.config.serve import ServeConfig

__all__ = ["HEADERS", "page_router"]

FOLDER = Path(__file__).parent / "playground"
INDEX = "index.html"
LIMITS = "limits.json"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
POLICY = (
    "default-src 'self'",
    "img-src 'self' data: blob:",
    "object-src 'none'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    # Browsers that know this one refuse markup made of text, wherever a script tries it.
    "require-trusted-types-for 'script'",
)
HEADERS: Mapping[str, str] = {
    # Asked again each time, and answered by 304: a new version of the server is a new page at once.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(POLICY),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every file."""


@dataclass(frozen=True)
class _File:
    body: bytes
    kind: str
    etag: str

    @classmethod
    def of(cls, name: str, body: bytes) -> _File:
        return cls(body, TYPES[Path(name).suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def page_router(config: ServeConfig | None = None) -> APIRouter:
    """`/` and the files that it asks for, below `/playground/`.

    Args:
        config: whose limits the page tells; the defaults where it is None.
    """
    files = {path.name: _File.of(path.name, path.read_bytes()) for path in sorted(FOLDER.iterdir())}
    files[LIMITS] = _File.of(LIMITS, _limits(config or ServeConfig()))
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return _answer(files[INDEX], request)

    @router.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def file(name: str, request: Request) -> Response:
        # Nothing is opened here: what was not there at the start is not there.
        if name not in files:
            raise HTTPException(404, f"the playground has no file {name[:60]!r}")
        return _answer(files[name], request)

    return router


def _limits(config: ServeConfig) -> bytes:
    told = {
        "max_images": config.max_images,
        "max_image_bytes": config.max_image_bytes,
        "max_image_pixels": config.max_image_pixels,
    }
    return json.dumps(told).encode()


def _answer(file: _File, request: Request) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.kind, headers=headers)

"""The HTTP API, put together: OpenAI's routes, those of packs, and those of operations.

The replicas behind it are whatever keeps the contracts: Ray handles or fakes.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI

from pipelines.serve import health
from pipelines.serve.chat import chat_routes
from pipelines.serve.document import add_document
from pipelines.serve.embedding_routes import embedding_routes
from pipelines.serve.errors import install_error_handlers
from pipelines.serve.middleware import install
from pipelines.serve.model_routes import model_routes
from pipelines.serve.pack_routes import pack_routes
from pipelines.serve.services import Services

__all__ = ["build_api"]


def build_api(services: Services, pages: Sequence[APIRouter] = ()) -> FastAPI:
    """The application.

    Args:
        pages: further routes, which the API's document does not tell of.
    """
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    install(app, services)
    for make in (chat_routes, model_routes, pack_routes, embedding_routes, health.router):
        app.include_router(make(services))
    add_document(app, services)
    for page in pages:
        app.include_router(page)
    return app

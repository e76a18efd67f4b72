"""`POST /v1/embeddings`: pictures as vectors, in which near ones look alike."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from mmicl_core.config.serve import ServeConfig
from pipelines.serve.contracts import Embeddings
from pipelines.serve.document import answers, body
from pipelines.serve.model_routes import find_model
from pipelines.serve.reading import Pictures, read_json
from pipelines.serve.schema_packs import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from pipelines.serve.services import Services
from pipelines.serve.waiting import Deadline, attend

__all__ = ["embedding_routes"]


def embedding_routes(services: Services) -> APIRouter:
    """The one route of embeddings."""
    router = APIRouter(tags=["embeddings"])

    @router.post(
        "/v1/embeddings",
        openapi_extra=body(EmbeddingRequest),
        **answers(EmbeddingList, 400, 404, 408, 413, 415, 429, 503, 504),
    )
    async def create_embeddings(request: Request) -> Response:
        """Embed pictures by what the frozen backbone sees in them. Texts are not embedded."""
        deadline = Deadline(services.config.request_seconds)
        sent, pictures = await read_json(
            request, EmbeddingRequest, lambda sent: _read_pictures(sent, services.config)
        )

        async def embed() -> Embeddings:
            find_model(await services.generator.models(), sent.model)
            request.state.model = sent.model
            loaded = await pictures.load(services.media)
            return await services.compressor.embed([loaded[str(place)] for place in range(len(loaded))])

        found = await attend(request, deadline, embed())
        told = EmbeddingList(
            object="list",
            data=[
                Embedding(object="embedding", index=index, embedding=_written(vector, sent.encoding_format))
                for index, vector in enumerate(found.vectors)
            ],
            model=sent.model,
            usage=EmbeddingUsage(prompt_tokens=found.tokens, total_tokens=found.tokens),
        )
        return Response(told.model_dump_json(), media_type="application/json")

    return router


def _read_pictures(sent: EmbeddingRequest, limits: ServeConfig) -> Pictures:
    pictures = Pictures(limits)
    for place, one in enumerate(sent.input):
        pictures.add(str(place), one.image_url.url, f"input.{place}")
    return pictures


def _written(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)

"""`/v1/demo_packs`: demonstrations that are fused once and named in later requests.

Compressors only fuse. What a pack is, the ingress reads off the bank's files itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from mmicl_core.bank import PackEntry
from pipelines.serve.contracts import ServedModel
from pipelines.serve.conversation import as_demonstrations, read_demonstrations
from pipelines.serve.document import BINARY, answers, binary_body, body
from pipelines.serve.model_routes import find_fusing, model_of
from pipelines.serve.reading import check_media_type, read_json
from pipelines.serve.schema_packs import DeletedPack, DemoPack, DemoPackList, DemoPackRequest
from pipelines.serve.services import Services
from pipelines.serve.waiting import Deadline, attend

__all__ = ["pack_routes"]

JSON = "application/json"
BUSY = (429, 503, 504)


def pack_routes(services: Services) -> APIRouter:
    """Makes, lists, describes, deletes, exports and imports packs of the tenant."""
    router = APIRouter(tags=["demo_packs"])
    _add_what_makes(router, services)
    _add_what_keeps(router, services)
    return router


def _add_what_makes(router: APIRouter, services: Services) -> None:
    @router.post(
        "/v1/demo_packs",
        openapi_extra=body(DemoPackRequest),
        **answers(DemoPack, 400, 404, 408, 409, 413, 415, *BUSY),
    )
    async def create_demo_pack(request: Request) -> Response:
        """Fuse demonstrations and keep them; equal ones give the pack that is there already."""
        deadline = Deadline(services.config.request_seconds)
        sent, (turns, pictures) = await read_json(
            request, DemoPackRequest, lambda sent: read_demonstrations(sent.demonstrations, services.config)
        )
        deadline.shorten(sent.timeout_seconds)

        async def register() -> DemoPack:
            models = await services.generator.models()
            model = find_fusing(models, sent.model)
            request.state.model = model.id
            demonstrations = as_demonstrations(turns, await pictures.load(services.media))
            entry = await services.compressor.register(model.id, request.state.tenant, demonstrations)
            return _described(entry, models)

        return _json(await attend(request, deadline, register()))

    @router.post(
        "/v1/demo_packs/import",
        openapi_extra=binary_body("A pack as its export gives it."),
        **answers(DemoPack, 408, 409, 413, 415, *BUSY),
    )
    async def import_demo_pack(request: Request) -> Response:
        """Take in a pack that a server with the same model exported."""
        check_media_type(request, BINARY)
        data = await request.body()
        models = await services.generator.models()
        makers = [model.maker for model in models if model.fuses]
        entry = await asyncio.to_thread(services.bank.take_in, request.state.tenant, data, makers)
        return _json(_described(entry, models))


def _add_what_keeps(router: APIRouter, services: Services) -> None:
    bank = services.bank

    @router.get("/v1/demo_packs", **answers(DemoPackList, *BUSY))
    async def list_demo_packs(request: Request) -> Response:
        """All packs, newest first."""
        entries = await asyncio.to_thread(bank.packs, request.state.tenant)
        models = await services.generator.models()
        return _json(DemoPackList(object="list", data=[_described(entry, models) for entry in entries]))

    @router.get("/v1/demo_packs/{pack_id}", **answers(DemoPack, 404, 409, *BUSY))
    async def describe_demo_pack(pack_id: str, request: Request) -> Response:
        """What a pack is and costs."""
        entry = await asyncio.to_thread(bank.describe, request.state.tenant, pack_id)
        return _json(_described(entry, await services.generator.models()))

    @router.delete("/v1/demo_packs/{pack_id}", **answers(DeletedPack, 404, 409))
    async def delete_demo_pack(pack_id: str, request: Request) -> Response:
        """Forget a pack."""
        await asyncio.to_thread(bank.delete, request.state.tenant, pack_id)
        return _json(DeletedPack(id=pack_id, object="demo_pack", deleted=True))

    @router.get("/v1/demo_packs/{pack_id}/export", **answers(None, 404, 409))
    async def export_demo_pack(pack_id: str, request: Request) -> Response:
        """A pack as a safetensors file, for the import of another server."""
        data = await asyncio.to_thread(bank.export, request.state.tenant, pack_id)
        name = {"content-disposition": f'attachment; filename="{pack_id}.safetensors"'}
        return Response(data, media_type=BINARY, headers=name)


def _described(entry: PackEntry, models: Sequence[ServedModel]) -> DemoPack:
    # What comes from another server may be called otherwise there.
    model = model_of(models, entry.maker)
    return DemoPack(
        id=entry.id,
        object="demo_pack",
        model=entry.model if model is None else model.id,
        created=entry.created,
        demonstrations=len(entry.tokens_full),
        tokens_full=sum(entry.tokens_full),
        tokens_fused=sum(entry.tokens_fused),
    )


def _json(told: DemoPack | DemoPackList | DeletedPack) -> Response:
    return Response(told.model_dump_json(), media_type=JSON)

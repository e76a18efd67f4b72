"""Which models are served: `/v1/models`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import APIRouter
from fastapi.responses import Response

from mmicl_core.bank import Maker
from pipelines.serve.contracts import ServedModel
from pipelines.serve.document import answers
from pipelines.serve.errors import RequestError, UnknownModelError
from pipelines.serve.schema_packs import Model, ModelList
from pipelines.serve.services import Services

__all__ = ["find_fusing", "find_model", "model_of", "model_routes"]


def find_model(models: Sequence[ServedModel], name: str) -> ServedModel:
    """The model that a request names.

    Raises:
        UnknownModelError: it is not served here.
    """
    for model in models:
        if model.id == name:
            return model
    served = ", ".join(repr(model.id) for model in models)
    raise UnknownModelError(f"model {name!r} is not served here; these are: {served}", "model")


def find_fusing(models: Sequence[ServedModel], name: str | None) -> ServedModel:
    """The model that is to fuse demonstrations.

    Args:
        name: None takes the only one that can.

    Raises:
        UnknownModelError: it is not served here.
        RequestError: it does not fuse, or none is named and there is not exactly one.
    """
    fusing = [model for model in models if model.fuses]
    known = " or ".join(repr(model.id) for model in fusing) or "no model that is served here"
    if name is None:
        if len(fusing) == 1:
            return fusing[0]
        raise RequestError(f"model is needed here, and {known} fuses demonstrations: name one", "model")
    model = find_model(models, name)
    if not model.fuses:
        raise RequestError(
            f"model {name!r} does not fuse demonstrations, {known} does: name that, or send demonstrations "
            'in full ("demonstrations": "full")',
            "model",
        )
    return model


def model_of(models: Sequence[ServedModel], maker: Maker) -> ServedModel | None:
    """The model that fuses as `maker` did."""
    return next((model for model in models if model.fuses and dict(model.maker) == dict(maker)), None)


def model_routes(services: Services) -> APIRouter:
    """Lists models and describes one."""
    router = APIRouter(tags=["models"])
    created = int(time.time())

    @router.get("/v1/models", **answers(ModelList, 429, 503, 504))
    async def list_models() -> Response:
        """The base model, and the base model with each adapter."""
        models = await services.generator.models()
        listed = ModelList(object="list", data=[_described(model, created) for model in models])
        return Response(listed.model_dump_json(), media_type="application/json")

    @router.get("/v1/models/{model:path}", **answers(Model, 404, 429, 503, 504))
    async def describe_model(model: str) -> Response:
        """One model."""
        found = _described(find_model(await services.generator.models(), model), created)
        return Response(found.model_dump_json(), media_type="application/json")

    return router


def _described(model: ServedModel, created: int) -> Model:
    return Model(
        id=model.id,
        object="model",
        created=created,
        owned_by="mmicl",
        method=model.method,
        fuses=model.fuses,
        context_length=model.context_length,
    )

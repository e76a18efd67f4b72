"""What has to hold before a server is started, and what can be known then without loading a model."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from mmicl_core.assets import EMBEDDED, resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, outline_backbone
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods import load_method
from mmicl_core.methods.adapter import adapter_identity
from mmicl_core.methods.base import Method

__all__ = [
    "check_adapters",
    "fit_adapter",
    "located",
    "outline",
    "refuse_taken_port",
    "refuse_unfinished_model",
    "user_config",
]


def located(run: RunConfig) -> RunConfig:
    """The run with absolute paths: replicas have other working directories than the command."""
    config = run.serve
    changes: dict[str, Any] = {
        "adapters": {name: _located(folder) for name, folder in config.adapters.items()},
        "bank": _located(config.bank),
        "keys": None if config.keys is None else _located(config.keys),
    }
    if config.vllm is not None:
        model = _located(config.vllm.language_model)
        changes["vllm"] = config.vllm.model_copy(update={"language_model": model})
    backbone = run.backbone.model_copy(update={"path": _located(run.backbone.path)})
    return run.model_copy(update={"backbone": backbone, "serve": config.model_copy(update=changes)})


def user_config(run: RunConfig) -> dict[str, Any]:
    """What replicas are told while they run. The digest tells them of an adapter that was trained anew.

    Raises:
        ConfigError: the package has no such adapter.
        CheckpointError: an adapter does not exist.
    """
    folders = {name: resolve(folder) for name, folder in run.serve.adapters.items()}
    return {
        "adapters": {
            name: {"folder": str(folder), "identity": adapter_identity(folder)}
            for name, folder in folders.items()
        }
    }


def refuse_unfinished_model(run: RunConfig) -> None:
    """Make sure that a run names a model as it is.

    Raises:
        ConfigError: the model has to be made first.
    """
    if run.backbone.vision_tower is not None:
        raise ConfigError(
            f"backbone.vision_tower is {run.backbone.vision_tower!r}, but a server loads finished models: "
            "set backbone.path to the folder that training wrote, and leave backbone.vision_tower out"
        )


def refuse_taken_port(config: ServeConfig) -> None:
    """Make sure that the server can listen.

    Raises:
        ConfigError: somebody else does, or the address is none of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        # A port whose last connections are still being closed is free for a new listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"serve.host {config.host} and serve.port {config.port} cannot be listened on ({error}): "
                "stop what listens there, or set another serve.port"
            ) from error


def outline(run: RunConfig) -> HuggingFaceBackbone:
    """The model that is to be served, without its weights.

    Raises:
        ConfigError: the model has to be made first.
        BackboneError: the folder is no model that can be served.
    """
    refuse_unfinished_model(run)
    return outline_backbone(resolve(run.backbone.path))


def fit_adapter(folder: str, backbone: HuggingFaceBackbone) -> Method:
    """An adapter around a model without weights: every name and shape of it is compared.

    Raises:
        ConfigError: the package has no such adapter.
        CheckpointError: there is none, or it is of another model.
    """
    return load_method(resolve(folder), backbone)


def check_adapters(run: RunConfig) -> None:
    """Make sure that all adapters of a run can be loaded. Raises as the two above do."""
    for folder in run.serve.adapters.values():
        # Some methods change the model that they are put around.
        fit_adapter(folder, outline(run))


def _located(path: str) -> str:
    return path if path.startswith(EMBEDDED) else str(Path(path).absolute())

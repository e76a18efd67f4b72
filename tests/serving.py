"""A tiny model behind the real server, and a client's side of it."""

from __future__ import annotations

import base64
import socket
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray import serve

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.model import AimConfig, BackboneConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.methods.aim import Aim
from pipelines.serve import app
from tests.fakes import draw_picture, encode_picture, tiny_backbone

__all__ = [
    "BASE",
    "FUSES",
    "address_of",
    "answers",
    "asked",
    "data_uri",
    "demonstrations",
    "free_port",
    "replica_states",
    "replicas_of",
    "tiny_run",
    "told",
    "write_aim",
]

BASE, FUSES = "tiny", "tiny@aim"
VISUAL_TOKENS = 25


def tiny_run(folder: Path, **settings: Any) -> RunConfig:
    """A run that serves a tiny untrained backbone with an AIM adapter, both written to `folder`."""
    if not (folder / "backbone").is_dir():
        tiny_backbone().save(folder / "backbone")
        write_aim(folder, folder / "adapter")
    config: dict[str, Any] = {
        "port": free_port(),
        "model_name": BASE,
        "adapters": {"aim": str(folder / "adapter")},
        "bank": str(folder / "bank"),
        "bank_disk_bytes": 2**24,
        "max_new_tokens": 6,
        "max_image_pixels": 10_000,
    }
    return RunConfig(
        backbone=BackboneConfig(path=str(folder / "backbone")), serve=ServeConfig(**config | settings)
    )


def write_aim(folder: Path, adapter: Path, **settings: Any) -> None:
    """An untrained AIM adapter of the backbone in `folder`."""
    Aim(load_backbone(folder / "backbone"), AimConfig(**settings)).save(adapter, {})


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def address_of(run: RunConfig) -> str:
    return f"http://127.0.0.1:{run.serve.port}"


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        return httpx.get(f"{url}/healthz").is_success
    except httpx.TransportError:
        return False


def data_uri(seed: int, side: int = 72) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_picture(draw_picture(seed, side))).decode()


def asked(*seeds: int, side: int = 72, text: str = "This is") -> dict[str, Any]:
    """A question about pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(seed, side)}} for seed in seeds or (99,)]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def _named(seed: int) -> str:
    return "bako mute"[seed % 2 :]


def demonstrations(*seeds: int) -> list[dict[str, Any]]:
    """What a pack is made of."""
    return [
        {"image_url": {"url": data_uri(seed)}, "question": "This is", "answer": _named(seed)}
        for seed in seeds
    ]


def told(*seeds: int) -> list[dict[str, Any]]:
    """The same demonstrations as turns of a conversation."""
    return [
        message for seed in seeds for message in (asked(seed), {"role": "assistant", "content": _named(seed)})
    ]


def replica_states() -> dict[str, dict[str, int]]:
    """Of each deployment, how many replicas are in which state."""
    application = serve.status().applications.get(app.APPLICATION)
    deployments = {} if application is None else application.deployments
    return {name: dict(status.replica_states) for name, status in deployments.items()}


def replicas_of(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas, of the Ray that this process started and of no other."""
    return actors_of(f"ServeReplica:{app.APPLICATION}:{deployment}")


def actors_of(name: str) -> list[psutil.Process]:
    """The processes of actors of that name, of the Ray that this process started and of no other."""
    title = f"ray::{name}"
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            # What a replica is doing may stand behind its name.
            if process.cmdline()[:1] and process.cmdline()[0].split(".")[0] == title:
                found.append(process)
        except psutil.Error:
            continue
    return found

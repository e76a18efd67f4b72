"""The server: an ingress, compressor replicas and generator replicas, bound together and started.

    HTTP -> ingress --demonstrations--> compressor --> bank
               |    <--fused tokens---
               `----prompt, pictures, fused tokens----> generator

Nothing is loaded before a replica is constructed.
"""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from mmicl_core.assets import resolve
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import ConfigError
from pipelines.environment import ray_outlives_the_program
from pipelines.serve.compressor import Compressor
from pipelines.serve.generator import Generator
from pipelines.serve.ingress import Ingress

__all__ = ["APPLICATION", "build", "start", "stop"]

APPLICATION = "mmicl"

# Both kinds of replicas must fit on a laptop of two cores; they are seldom busy together.
CPUS_OF_A_REPLICA = 0.5
# The ingress only waits for replicas: what bounds it is memory for pictures, not threads.
REQUESTS_AT_THE_INGRESS = 128
# A model that could not be loaded once will not load the next time.
CONSTRUCTOR_RETRIES = 1
HEALTH_SECONDS = 60.0
HEALTH_POLL_SECONDS = 0.1
EVERY_ADDRESS = ("0.0.0.0", "::")
OWN_ERRORS = "mmicl_core.errors."
FAILED = "DEPLOY_FAILED"


def build(run: RunConfig) -> Application:
    """Bind the deployments of a run.

    Raises:
        ConfigError: the model has to be made first, or an embedded asset does not exist.
    """
    if run.backbone.vision_tower is not None:
        raise ConfigError(
            f"backbone.vision_tower is {run.backbone.vision_tower!r}, but a server loads finished models: "
            "set backbone.path to the folder that training wrote, and leave backbone.vision_tower out"
        )
    config = run.serve
    backbone = resolve(run.backbone.path)
    options = _options(config)
    compressor = serve.deployment(name="compressor", num_replicas=config.compressor_replicas, **options)(
        Compressor
    ).bind(backbone, resolve(config.adapter), Path(config.bank).absolute(), config.max_image_pixels)
    generator = serve.deployment(name="generator", num_replicas=config.generator_replicas, **options)(
        Generator
    ).bind(backbone, config.max_image_pixels)
    ingress = serve.deployment(
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=REQUESTS_AT_THE_INGRESS,
    )(Ingress)
    return ingress.bind(config, compressor, generator)


def start(run: RunConfig) -> str:
    """Start the server on the connected Ray cluster and wait until it answers.

    Returns:
        Its address, `http://HOST:PORT`; OpenAI's base URL is that and `/v1`.

    Raises:
        ConfigError: the port is taken, or a replica cannot load its model. Nothing is left running.
    """
    config = run.serve
    application = build(run)
    _refuse_taken_port(config)
    with ExitStack() as undo:
        undo.callback(stop)
        serve.start(http_options={"host": config.host, "port": config.port})
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise ConfigError(f"the server did not start: {_why_it_failed() or error}") from error
        host = "127.0.0.1" if config.host in EVERY_ADDRESS else config.host
        address = f"http://{host}:{config.port}"
        _wait_for_health(address)
        undo.pop_all()
    return address


def stop() -> None:
    """Stop the server, and Ray Serve itself where nothing else runs on it.

    A Ray that ends with this program takes its Serve along: ended before, Serve's controller dies while
    it is waited for, and Ray prints to stdout that a task has failed.
    """
    if APPLICATION in serve.status().applications:
        serve.delete(APPLICATION)
    if ray_outlives_the_program() and not serve.status().applications:
        serve.shutdown()


def _why_it_failed() -> str:
    """The last line of every failed deployment's traceback."""
    deployments = serve.status().applications[APPLICATION].deployments
    return "; ".join(
        f"{name}: {deployment.message.strip().splitlines()[-1].removeprefix(OWN_ERRORS)}"
        for name, deployment in deployments.items()
        if deployment.status == FAILED
    )


def _options(config: ServeConfig) -> dict[str, Any]:
    gpus = ray.cluster_resources().get("GPU", 0)
    replicas = config.compressor_replicas + config.generator_replicas
    actor = {"num_cpus": CPUS_OF_A_REPLICA, "num_gpus": min(1.0, gpus / replicas)}
    return {"ray_actor_options": actor, "max_constructor_retry_count": CONSTRUCTOR_RETRIES}


def _refuse_taken_port(config: ServeConfig) -> None:
    with socket.socket() as probe:
        # A port whose last connections are still being closed is free for a new listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"serve.host {config.host} and serve.port {config.port} cannot be listened on ({error}): "
                "stop what listens there, or set another serve.port"
            ) from error


def _wait_for_health(address: str) -> None:
    deadline = time.monotonic() + HEALTH_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{address}/healthz", timeout=HEALTH_SECONDS):
                return
        except urllib.error.URLError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{address}/healthz does not answer after {HEALTH_SECONDS:.0f} s ({error}): another "
                    "Ray Serve of this cluster may listen elsewhere"
                ) from error
        time.sleep(HEALTH_POLL_SECONDS)

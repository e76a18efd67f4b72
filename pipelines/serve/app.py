"""The server: an ingress, compressor replicas and generator replicas, bound together and started.

    HTTP -> ingress --demonstrations--> compressor --> bank
               |    <--fused tokens---
               `----prompt, pictures, fused tokens----> generator

Nothing is loaded before a replica is constructed. Adapters are no part of what it is constructed with: they
come as Ray Serve's `user_config`, so that others can be loaded while it answers.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig

from mmicl_core.assets import resolve
from mmicl_core.config.base import explain
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ReplicasConfig, ServeConfig
from mmicl_core.errors import ConfigError
from pipelines.environment import ray_outlives_the_program
from pipelines.serve.compressor import Compressor
from pipelines.serve.generator import Generator
from pipelines.serve.ingress import Ingress
from pipelines.serve.premises import (
    check_adapters,
    located,
    refuse_taken_port,
    refuse_unfinished_model,
    user_config,
)
from pipelines.serve.vllm_generator import VllmGenerator

__all__ = [
    "APPLICATION",
    "COMPRESSOR",
    "GENERATOR",
    "INGRESS",
    "build",
    "deploy",
    "reload",
    "start",
    "stop",
]

APPLICATION = "mmicl"
INGRESS, COMPRESSOR, GENERATOR = "ingress", "compressor", "generator"

# Beside those that wait for replicas: probes, lists, uploads that are still on their way.
MORE_REQUESTS_AT_THE_INGRESS = 64
# A model that could not be loaded once will not load the next time.
CONSTRUCTOR_RETRIES = 1
# How often the load is told to whoever decides how many replicas there are; 10 by default, which no load that
# is shorter would survive.
LOAD_TOLD_SECONDS = 1.0
LOOK_BACK_SECONDS = (2.0, 30.0)
CHECK_EVERY_SECONDS, CHECK_TIMEOUT_SECONDS = 5.0, 30.0
# A replica that is to end looks so often whether its last answer has ended.
DRAIN_POLL_SECONDS = 0.5
HEALTH_SECONDS = 60.0
POLL_SECONDS = 0.1
EVERY_ADDRESS = ("0.0.0.0", "::")
OWN_ERRORS = ("mmicl_core.errors.", "pipelines.serve.errors.")
FAILED = "DEPLOY_FAILED"
# Ray divides a GPU into so many parts.
GPU_PARTS = 10_000


def build(run: RunConfig) -> Application:
    """Bind the deployments of a run.

    Raises:
        ConfigError: the model has to be made first, or an embedded asset does not exist.
        CheckpointError: an adapter does not exist.
    """
    refuse_unfinished_model(run)
    run = located(run)
    config, version = run.serve, _version_of_processes(run)
    backbone, adapters = resolve(run.backbone.path), user_config(run)

    def deployment(kind: type[Any], name: str, **options: Any) -> Deployment:
        made: Deployment = serve.deployment(
            name=name,
            user_config=adapters,
            max_constructor_retry_count=CONSTRUCTOR_RETRIES,
            health_check_period_s=CHECK_EVERY_SECONDS,
            health_check_timeout_s=CHECK_TIMEOUT_SECONDS,
            # All answers end within this time, so that none is cut off.
            graceful_shutdown_timeout_s=config.request_seconds,
            graceful_shutdown_wait_loop_s=DRAIN_POLL_SECONDS,
            **options,
        )(kind)
        # Without a version, Ray takes every deployment for new code, and starts new processes for it.
        return made.options(version=version, _internal=True)

    compressor = deployment(Compressor, COMPRESSOR, **_options(config.compressor, config))
    answers = Generator if config.vllm is None else VllmGenerator
    generator = deployment(answers, GENERATOR, **_options(config.generator, config))
    kinds = (config.compressor, config.generator)
    waiting = sum(kind.at_once * kind.most + kind.queued for kind in kinds)
    ingress = deployment(
        Ingress,
        INGRESS,
        num_replicas=config.ingress_replicas,
        max_replicas_per_node=config.ingress_per_node,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=waiting + MORE_REQUESTS_AT_THE_INGRESS,
    )
    return ingress.bind(
        config, compressor.bind(backbone, config, ray.put), generator.bind(backbone, config), APPLICATION
    )


def deploy(args: Mapping[str, Any]) -> Application:
    """What a file of `mmicl serve build` names: Ray calls it on the cluster with the settings in the file.

    Raises:
        ConfigError: a setting is wrong.
    """
    try:
        return build(RunConfig.model_validate(args))
    except ValidationError as error:
        raise explain(error, "args of the Serve application") from error


def start(run: RunConfig) -> str:
    """Start the server on the connected Ray cluster and wait until it answers.

    Returns:
        Its address, `http://HOST:PORT`; OpenAI's base URL is that and `/v1`.

    Raises:
        ConfigError: the port is taken, or a replica cannot load its model. Nothing is left running.
    """
    config = run.serve
    application = build(run)
    refuse_taken_port(config)
    with ExitStack() as undo:
        undo.callback(stop)
        serve.start(http_options={"host": config.host, "port": config.port})
        _run(application)
        host = "127.0.0.1" if config.host in EVERY_ADDRESS else config.host
        address = f"http://{host}:{config.port}"
        _wait_for_health(address)
        undo.pop_all()
    return address


def reload(run: RunConfig) -> None:
    """Serve the adapters of a run that is served already, as they are now in their folders. Replicas stay,
    and finish what they are answering with the adapters that they had.

    Raises:
        ConfigError: it is not served, or it could not be changed.
        CheckpointError: an adapter does not exist or does not fit; nothing is changed.
    """
    if APPLICATION not in serve.status().applications:
        raise ConfigError("nothing is served here: start it with `mmicl serve`")
    # A replica that cannot take its new settings is ended by Ray, and so is the one in its place.
    check_adapters(run)
    _run(build(run))


def stop() -> None:
    """Stop the server when its last answer has ended, and Ray Serve where nothing else runs on it.

    A Ray that ends with this program takes its Serve along: ended before, Serve's controller dies while
    it is waited for, and Ray prints to stdout that a task has failed.
    """
    if APPLICATION in serve.status().applications:
        # Ray's own waiting ends after a minute, whatever the replicas are allowed.
        serve.delete(APPLICATION, _blocking=False)
        while APPLICATION in serve.status().applications:
            time.sleep(POLL_SECONDS)
    if ray_outlives_the_program() and not serve.status().applications:
        serve.shutdown()


def _version_of_processes(run: RunConfig) -> str:
    """Changes with every setting that a running replica cannot take over."""
    told = run.model_dump(mode="json", include={"backbone": True, "serve": True})
    del told["serve"]["adapters"]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _options(kind: ReplicasConfig, config: ServeConfig) -> dict[str, Any]:
    gpus = _share_of_gpus(config) if kind.gpus is None else kind.gpus
    return {
        "autoscaling_config": _scaling(kind),
        "ray_actor_options": {"num_cpus": kind.cpus, "num_gpus": gpus},
        "max_ongoing_requests": kind.at_once,
        "max_queued_requests": kind.queued,
    }


def _scaling(kind: ReplicasConfig) -> AutoscalingConfig:
    shortest, longest = LOOK_BACK_SECONDS
    with warnings.catch_warnings():
        # That `metrics_interval_s` gives way to an environment variable, which Ray 2.60 does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=kind.fewest,
            max_replicas=kind.most,
            target_ongoing_requests=kind.requests_each,
            upscale_delay_s=kind.upscale_seconds,
            downscale_delay_s=kind.downscale_seconds,
            downscale_to_zero_delay_s=kind.downscale_seconds,
            look_back_period_s=min(max(kind.upscale_seconds, shortest), longest),
            metrics_interval_s=LOAD_TOLD_SECONDS,
        )


def _share_of_gpus(config: ServeConfig) -> float:
    replicas = config.compressor.most + config.generator.most
    share = float(ray.cluster_resources().get("GPU", 0)) / replicas
    return min(1.0, math.floor(share * GPU_PARTS) / GPU_PARTS)


def _run(application: Application) -> None:
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ConfigError(f"the server did not start: {_why_it_failed() or error}") from error


def _why_it_failed() -> str:
    """The last line of every failed deployment's traceback."""
    deployments = serve.status().applications[APPLICATION].deployments
    return "; ".join(
        f"{name}: {_last_line(deployment.message)}"
        for name, deployment in deployments.items()
        if deployment.status == FAILED
    )


def _last_line(message: str) -> str:
    line = message.strip().splitlines()[-1]
    for prefix in OWN_ERRORS:
        line = line.removeprefix(prefix)
    return line


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
        time.sleep(POLL_SECONDS)

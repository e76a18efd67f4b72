"""Ray: a method that is fitted without gradients, in one task that loads the model once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
import torch

from mmicl_core.backbones.hugging_face import load_for_inference
from mmicl_core.config.model import MtvConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods import build_method
from mmicl_core.methods.mtv import Mtv
from pipelines.episodes import read_episodes
from pipelines.feed import open_pictures
from pipelines.materials import Materials
from pipelines.progress import counting

__all__ = ["fit"]


def fit(run: RunConfig, materials: Materials, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Fit the method of `run` and save it in `folder`; gives what was found.

    Raises:
        ConfigError: episodes are streamed, which a fit cannot look through.
    """
    if materials.episodes is None:
        raise ConfigError(
            "method mtv looks through its episodes more than once, but episodes.streamed is true: set it to "
            "false"
        )
    assert isinstance(run.method, MtvConfig)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    with counting("Searching for heads", run.method.steps) as counter:
        task = ray.remote(_fit).options(num_cpus=1, num_gpus=gpus)
        found: dict[str, Any] = ray.get(task.remote(run, materials, folder, about, counter))
    return found


def _fit(
    run: RunConfig, materials: Materials, folder: Path, about: dict[str, Any], counter: Any
) -> dict[str, Any]:
    torch.set_num_threads(run.train.threads_per_worker)
    method = build_method(load_for_inference(materials.backbone), run.method)
    assert isinstance(method, Mtv) and materials.episodes is not None
    rows = read_episodes(materials.episodes)
    pictures = open_pictures(run, method, materials, rows)
    begun = time.monotonic()
    found = method.fit(rows, pictures, seed=run.train.seed, progress=lambda _: ray.get(counter.add.remote(1)))
    seconds = round(time.monotonic() - begun, 1)
    method.save(folder, about | {"metrics": found})
    # What is kept are means and a choice.
    return {**found, "seconds": seconds, "trained_parameters": 0}

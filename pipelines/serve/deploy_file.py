"""`mmicl serve build`: a run as a file for `serve deploy`, for any Ray cluster with `mmicl` installed.

Adapters stand beside the settings and not among them. Where they alone change, deploying the file again loads
them into the replicas that run; where a setting changes, replicas are exchanged one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

from mmicl_core.assets import EMBEDDED
from mmicl_core.config.run import RunConfig
from mmicl_core.data.files import write_atomic
from pipelines.environment import DEFAULTS
from pipelines.serve.app import APPLICATION, COMPRESSOR, GENERATOR, INGRESS, deploy
from pipelines.serve.premises import located, refuse_unfinished_model, user_config

__all__ = ["serve_config", "write_deploy_file"]

HEAD = """# Written by `mmicl serve build`; `serve deploy FILE` starts it, and takes a changed one over.
# Paths are of the machine that wrote it: nodes need to find the same folders there.
"""


def serve_config(run: RunConfig) -> dict[str, Any]:
    """What Ray Serve is to run, in plain values.

    Raises:
        ConfigError: the model has to be made first, or the package has no such adapter.
        CheckpointError: an adapter does not exist.
    """
    refuse_unfinished_model(run)
    run = located(run)
    told = user_config(run)
    for name, adapter in told["adapters"].items():
        if run.serve.adapters[name].startswith(EMBEDDED):
            # The package lies elsewhere on other machines.
            adapter["folder"] = run.serve.adapters[name]
    args = run.model_dump(mode="json", include={"backbone": True, "serve": True})
    args["serve"]["adapters"] = {}
    config = {
        "http_options": {"host": run.serve.host, "port": run.serve.port},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": f"{deploy.__module__}:{deploy.__name__}",
                "runtime_env": {"env_vars": dict(DEFAULTS)},
                "args": args,
                "deployments": [
                    {"name": name, "user_config": told} for name in (INGRESS, COMPRESSOR, GENERATOR)
                ],
            }
        ],
    }
    # Ray's own reading of it, so that a mistake is found here and not on the cluster.
    ServeDeploySchema.model_validate(config)
    return config


def write_deploy_file(run: RunConfig, path: Path) -> None:
    """Write the file. Raises as above."""
    write_atomic(path, HEAD + yaml.dump(serve_config(run), sort_keys=False, Dumper=_Plain))


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice out twice: anchors are no help to a reader."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never refer back."""
        return True

"""All that the HTTP API stands on, as one value: replicas or fakes of them, the bank, what guards both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmicl_core.bank import Bank
from mmicl_core.config.serve import ServeConfig
from pipelines.serve.contracts import Compressing, Generating

if TYPE_CHECKING:
    from pipelines.serve.keys import Keys
    from pipelines.serve.limits import Limits
    from pipelines.serve.media import Media
    from pipelines.serve.metrics import Metrics

__all__ = ["Services"]


@dataclass(frozen=True)
class Services:
    """What `build_api` is given."""

    config: ServeConfig
    compressor: Compressing
    generator: Generating
    bank: Bank
    """Packs are described, listed, exported and deleted here, on the ingress: they are files."""
    media: Media
    keys: Keys
    limits: Limits
    metrics: Metrics
    replicas: Callable[[], Awaitable[Mapping[str, int]]]
    """Of each deployment, how many run."""

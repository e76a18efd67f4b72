"""Ray Data: pictures of a task -> vectors, by which similar and hard demonstrations are chosen.

pictures of queries and pool --embedder--> (N, E) on disk --cosine--> places in the pool, nearest first
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmicl_core.assets import resolve
from mmicl_core.config.base import fingerprint
from mmicl_core.config.corpus import EmbedderConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.embedders import build_embedder, embedder_identity
from mmicl_core.errors import ConfigError
from mmicl_core.evaluation.answering import picture_of
from mmicl_core.evaluation.demonstrations import Alike
from mmicl_core.evaluation.tasks.base import PictureSource, Questions
from pipelines.parts import Counts, Pool, run_parts
from pipelines.stages import Stage

__all__ = ["rank_by_similarity"]

PICTURES_OF_A_PART = 256
# Nearest ones that are looked at for those with other answers.
RANKED = 256
QUERIES_AT_ONCE = 256


def rank_by_similarity(questions: Questions, label: str, run: RunConfig, root: Path) -> Alike:
    """Rank the pool for every query, by the first picture of both.

    Raises:
        ConfigError: the run has no embedder, or one of texts alone.
    """
    if run.embedder is None or run.embedder.type == "text":
        kind = "none" if run.embedder is None else "'text'"
        raise ConfigError(
            f"evaluate.demonstrations {run.evaluate.demonstrations!r} compares pictures, but embedder is "
            f"{kind}: set embedder.type to dual_encoder, with the path of a CLIP or SigLIP model, or to "
            "vision_tower"
        )
    pool = [item.pictures[0] for item in questions.pool]
    asked = [item.pictures[0] for item in questions.queries]
    keys = sorted({*pool, *asked})
    vectors = _embed(keys, questions.pictures, run.embedder, resolve(run.backbone.path), label, root)
    at = {key: place for place, key in enumerate(keys)}
    among = torch.from_numpy(vectors[[at[key] for key in pool]])
    ranked: dict[str, list[int]] = {}
    for start in range(0, len(asked), QUERIES_AT_ONCE):
        wanted = torch.from_numpy(vectors[[at[key] for key in asked[start : start + QUERIES_AT_ONCE]]])
        # Vectors have length 1, so that their product is the cosine.
        places = torch.topk(wanted @ among.T, min(len(pool), RANKED)).indices.tolist()
        queries = questions.queries[start : start + QUERIES_AT_ONCE]
        ranked |= {item.id: row for item, row in zip(queries, places, strict=True)}
    return lambda query: ranked[query.id]


def _embed(
    keys: Sequence[str],
    pictures: PictureSource,
    config: EmbedderConfig,
    backbone: Path,
    label: str,
    root: Path,
) -> np.ndarray:
    """Vectors of all pictures, (N, E), of length 1."""
    stage = Stage(
        root,
        "similar",
        embedder=embedder_identity(config, backbone),
        pictures=fingerprint(repr(pictures), list(keys)),
    )
    parts = [
        {"name": f"{number:05d}", "keys": list(some), "size": len(some)}
        for number, some in enumerate(_pieces(keys))
    ]
    pool = Pool(_Embedder, (pictures, config, backbone), gpu=True)
    run_parts(stage, parts, pool, title=f"Comparing pictures of {label}", total=len(keys))
    found = [np.load(stage.folder / f"vectors-{part['name']}.npy") for part in parts]
    return np.concatenate(found).astype(np.float32)


def _pieces(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (keys[start : start + PICTURES_OF_A_PART] for start in range(0, len(keys), PICTURES_OF_A_PART))


class _Embedder:
    """Embeds parts with one embedder, which is loaded once."""

    def __init__(self, pictures: PictureSource, config: EmbedderConfig, backbone: Path) -> None:
        torch.set_num_threads(1)
        self._pictures, self._embedder = pictures, build_embedder(config, backbone)

    def __call__(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        vectors = self._embedder.pictures([picture_of(key, self._pictures) for key in part["keys"]])
        file = f"vectors-{part['name']}.npy"
        np.save(folder / file, vectors)
        return {file: len(vectors)}, {"embedded": len(vectors)}

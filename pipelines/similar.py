"""Ray Data: pictures of a task -> vectors, by which similar and hard demonstrations are chosen.

    pictures of queries and pool --SHA-256--> those that differ --embedder--> (N, E) on disk
    vectors --cosine--> places in the pool, nearest first

What a picture is called is of no account: vectors belong to bytes, and equal bytes are embedded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import ray
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

__all__ = ["picture_digests", "rank_by_similarity"]

PICTURES_OF_A_PART = 256
# Nearest ones that are looked at for those with other answers.
RANKED = 256
QUERIES_AT_ONCE = 256


def picture_digests(keys: Sequence[str], pictures: PictureSource) -> dict[str, str]:
    """SHA-256 of the bytes of pictures by key, in hex digits; many are read side by side.

    Args:
        keys: each once.

    Raises:
        DataError: a picture cannot be read, as the cause of Ray's error.
    """

    # Travels as it is: by name, it would have its workers import torch along with this module.
    def digest(source: PictureSource, some: Sequence[str]) -> list[str]:
        return [hashlib.sha256(source.read(key)).hexdigest() for key in some]

    side_by_side: Any = ray.remote(digest).options(num_cpus=1)
    source = ray.put(pictures)
    found = ray.get([side_by_side.remote(source, some) for some in _pieces(keys, PICTURES_OF_A_PART)])
    return dict(zip(keys, chain.from_iterable(found), strict=True))


def rank_by_similarity(questions: Questions, label: str, run: RunConfig, root: Path) -> Alike:
    """Rank the pool for every query, by the first picture of both; items with equal pictures stand in the
    order of the pool, and those with the query's own, whatever it is called there, are left out.

    Raises:
        ConfigError: the run has no embedder, or one of texts alone.
        DataError: a picture cannot be read, as the cause of Ray's error, or decoded.
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
    digests = picture_digests(sorted({*pool, *asked}), questions.pictures)
    keys = {digest: key for key, digest in digests.items()}
    vectors = _embed(keys, questions.pictures, run.embedder, resolve(run.backbone.path), label, root)
    places: dict[str, list[int]] = {}
    for place, key in enumerate(pool):
        places.setdefault(digests[key], []).append(place)
    shown = list(places)
    among = torch.from_numpy(np.stack([vectors[digest] for digest in shown]))
    ranked: dict[str, list[int]] = {}
    for start in range(0, len(asked), QUERIES_AT_ONCE):
        queries = questions.queries[start : start + QUERIES_AT_ONCE]
        wanted = [vectors[digests[key]] for key in asked[start : start + QUERIES_AT_ONCE]]
        # Vectors have length 1, so that their product is the cosine.
        cosines = torch.from_numpy(np.stack(wanted)) @ among.T
        nearest = torch.topk(cosines, min(len(shown), RANKED)).indices.tolist()
        for item, row in zip(queries, nearest, strict=True):
            alike = (shown[column] for column in row if shown[column] != digests[item.pictures[0]])
            ranked[item.id] = [place for digest in alike for place in places[digest]][:RANKED]
    return lambda query: ranked[query.id]


def _embed(
    keys: Mapping[str, str],
    pictures: PictureSource,
    config: EmbedderConfig,
    backbone: Path,
    label: str,
    root: Path,
) -> dict[str, np.ndarray]:
    """Vectors by digest, (E,), of length 1.

    Args:
        keys: of one picture of each digest.
    """
    digests = sorted(keys)
    stage = Stage(
        root, "similar", embedder=embedder_identity(config, backbone), pictures=fingerprint(digests)
    )
    parts = [
        {"name": f"{number:05d}", "keys": [keys[digest] for digest in some], "size": len(some)}
        for number, some in enumerate(_pieces(digests, PICTURES_OF_A_PART))
    ]
    pool = Pool(_Embedder, (pictures, config, backbone), gpu=True)
    run_parts(stage, parts, pool, title=f"Comparing pictures of {label}", total=len(digests))
    found = [np.load(stage.folder / f"vectors-{part['name']}.npy") for part in parts]
    return dict(zip(digests, np.concatenate(found).astype(np.float32), strict=True))


def _pieces(of: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (of[start : start + size] for start in range(0, len(of), size))


class _Embedder:
    """Embeds parts with one embedder, which is loaded once."""

    def __init__(self, pictures: PictureSource, config: EmbedderConfig, backbone: Path) -> None:
        torch.set_num_threads(1)
        self._pictures, self._embedder = pictures, build_embedder(config, backbone)
        self._batch = config.batch

    def __call__(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        # No more are held decoded than are embedded at once.
        vectors = [
            self._embedder.pictures([picture_of(key, self._pictures) for key in keys])
            for keys in _pieces(part["keys"], self._batch)
        ]
        file = f"vectors-{part['name']}.npy"
        np.save(folder / file, np.concatenate(vectors))
        return {file: part["size"]}, {"embedded": part["size"]}

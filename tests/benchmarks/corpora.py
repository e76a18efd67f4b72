"""Corpora made for measuring: photographs that are as hard to decode as real ones, in tar shards."""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_photographs"]

# 640 x 480 at this quality weighs some 47 kB.
WIDTH, HEIGHT, QUALITY = 640, 480, 85
GRAIN = 20


def write_photographs(folder: Path, shards: int, pictures: int) -> list[Path]:
    """Tar shards of JPEGs with captions, all different."""
    folder.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        return list(pool.map(partial(_write_shard, folder, pictures), range(shards)))


def _write_shard(folder: Path, pictures: int, number: int) -> Path:
    path = folder / f"{number:05d}.tar"
    with tarfile.open(path, "w") as archive:
        for picture in range(pictures):
            key = f"{number:05d}{picture:04d}"
            _add(archive, f"{key}.jpg", _photograph(number * pictures + picture))
            _add(archive, f"{key}.txt", f"photograph number {picture}".encode())
            _add(archive, f"{key}.json", b'{"concept": "thing %d"}' % (picture % 50))
    return path


def _photograph(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 255, (HEIGHT // GRAIN, WIDTH // GRAIN, 3), dtype=np.uint8))
    file = io.BytesIO()
    blocks.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))

"""Demonstrations and what a model made of them, for tests of the bank and of those who use it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmicl_core.bank import Bank, Demonstration, Fused, Known, PackEntry

CAT = Demonstration((b"picture of a cat",), "This is", "bako")
CUP = Demonstration((b"picture of a cup",), "This is", "mute")
PAIR = Demonstration((b"picture of a cat", b"picture of a cup"), "Alike?", "no")
MAKER = {"format": "1", "backbone": "model-a", "template": "template-a", "adapter": "projection-a"}
TENANT = "ann"
WIDTH = 8


def numbers(*shape: int, seed: int = 0) -> Fused:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def known(tokens: int = 6, seed: int = 0, vector: bool = True) -> Known:
    return Known(
        numbers(tokens, WIDTH, seed=seed), 25 + tokens, numbers(3, seed=seed + 1) if vector else None
    )


def put(bank: Bank, *demonstrations: Demonstration, tenant: str = TENANT, **changes: str) -> PackEntry:
    wanted = demonstrations or (CAT, CUP)
    made = [known(6 - 2 * number, number) for number in range(len(wanted))]
    return bank.put_pack(tenant, "nano@aim", MAKER | changes, wanted, made)


def pack_file(folder: Path, pack_id: str) -> Path:
    (path,) = folder.rglob(f"{pack_id}.safetensors")
    return path


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors*") if path.is_file())

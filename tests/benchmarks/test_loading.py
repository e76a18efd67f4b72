"""What loading a model takes of each of two workers: in pieces, as under ZeRO stage 3, and whole.

    make bench

Records the anonymous memory that a worker took at most while it loaded, in MiB, beside the size of the model,
which has the layers of SmolLM2-135M twice, and few words: one matrix, which passes whole, is then as small a
part of it as in models that need to be spread. Pages of the file itself, which the system shares and
drops as it likes, are not counted.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks.records import Figures

ROOT = Path(__file__).parents[2]
STAGES = {"in pieces": 3, "whole": 2}
MIB = 2**20
# Of the model: half, and what passes.
MOST = 0.6


def _anonymous() -> int:
    fields = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (found,) = (line.split()[1] for line in fields if line.startswith("RssAnon"))
    return int(found) * 1024


def load(folder: str, stage: str) -> None:
    """Load as one worker, and print the most that it took."""
    # Both ways import it, sooner or later.
    import deepspeed  # noqa: F401

    from mmicl_core.backbones.hugging_face import load_backbone
    from mmicl_core.config.train import TrainConfig
    from pipelines.zero import loading_in_pieces

    torch.distributed.init_process_group("gloo")
    before = most = _anonymous()
    done = threading.Event()

    def look() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, _anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    with loading_in_pieces(TrainConfig.model_validate({"zero": {"stage": int(stage)}})):
        backbone = load_backbone(Path(folder))
    done.set()
    thread.join()
    left = sum(getattr(p, "ds_tensor", p).numel() for p in backbone.parameters())
    told = {"rank": torch.distributed.get_rank(), "most": most - before, "elements": left}
    print("LOADED " + json.dumps(told), flush=True)


def _load_on_two(folder: Path, stage: int) -> list[dict[str, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    code = f"from tests.benchmarks.test_loading import load; load({str(folder)!r}, {str(stage)!r})"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            # What is freed goes back, so that what is held can be read off.
            env=os.environ
            | place
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
            | {"MALLOC_MMAP_THRESHOLD_": "65536"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines = [worker.communicate(timeout=240)[0] for worker in workers]
    assert not any(worker.returncode for worker in workers)
    told = [json.loads(text.partition("LOADED ")[2].splitlines()[0]) for text in lines]
    return sorted(told, key=lambda one: one["rank"])


@pytest.mark.bench
def test_worker_that_loads_in_pieces_never_holds_the_model_whole(tmp_path: Path, figures: Figures) -> None:
    from tests.benchmarks.test_plan import shaped_like_smol

    backbone = shaped_like_smol(vocab_size=4096, num_hidden_layers=60)
    backbone.model.save_pretrained(tmp_path)
    backbone.processor.save_pretrained(tmp_path)
    elements = sum(p.numel() for p in backbone.parameters())
    size = 4 * elements
    found = {name: _load_on_two(tmp_path, stage) for name, stage in STAGES.items()}
    figures.absolute("model", size / MIB, "MiB")
    figures.absolute("its largest matrix", 4 * max(p.numel() for p in backbone.parameters()) / MIB, "MiB")
    for name, told in found.items():
        figures.absolute(f"most memory of a worker, {name}", [one["most"] / MIB for one in told], "MiB")
        figures.ratio(f"the same over the model, {name}", [one["most"] / size for one in told])
    first, second = found["in pieces"]
    assert max(first["most"], second["most"]) < MOST * size
    assert first["elements"] + second["elements"] < 1.01 * elements

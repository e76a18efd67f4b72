"""Workers of `ZeroEngine` as plain processes: what they compute, without Ray around it.

    python -m tests.ranks FOLDER          with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT

FOLDER/cases.json holds the cases; the first rank writes FOLDER/NAME, FOLDER/NAME.count and
FOLDER/metrics.json.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmicl_core.config.model import AimConfig, LclConfig
from mmicl_core.config.train import TrainConfig
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.base import Method
from mmicl_core.methods.lcl import Lcl
from mmicl_core.training.checkpoint import Checkpoints, load_state
from mmicl_core.training.order import share_of_worker
from mmicl_core.training.step import MicroBatch, StepMetrics, mean_loss, train_step
from tests.fakes import draw_picture, episode_row, tiny_backbone

PICTURES = [f"p{number}" for number in range(7)]
NAMES = ["bako", "mute", "sidu", "goma"]
EPISODES = 7
ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 240


@dataclass(frozen=True)
class Case:
    """Steps of one run: from a checkpoint or the beginning, to a checkpoint."""

    name: str
    method: str
    train: Mapping[str, Any]
    steps: int = 1
    start: str = ""
    """Folder of the checkpoints to go on from."""
    recompute: bool = False
    validated: bool = False
    """Whether the loss is measured after each step."""
    broken: str = ""
    """The episode whose loss is infinite, with a gradient of 0, at the step `broken_at`."""
    broken_at: int = -1

    def config(self) -> TrainConfig:
        """Settings: seven episodes a step, so that no number of workers but one divides them."""
        return TrainConfig.model_validate({"global_batch": EPISODES, "warmup_steps": 0, **self.train})


class _Aim(Aim):
    infinite: Sequence[Any] = ()

    def forward(self, batch: Any) -> Tensor:
        nll = super().forward(batch)
        return nll + math.inf if any(batch is one for one in self.infinite) else nll


class _Lcl(Lcl):
    infinite: Sequence[Any] = ()

    def forward(self, batch: Any) -> Tensor:
        nll = super().forward(batch)
        return nll + math.inf if any(batch is one for one in self.infinite) else nll


def build(case: Case) -> _Aim | _Lcl:
    """The method of a case on a tiny backbone; a loss may be infinite while its gradient is not."""
    backbone = tiny_backbone()
    method = _Aim(backbone, AimConfig()) if case.method == "aim" else _Lcl(backbone, LclConfig())
    if case.recompute:
        method.backbone.checkpoint_gradients()
    return method


def episodes() -> list[dict[str, Any]]:
    """Episodes of different lengths and of different numbers of scored tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(EPISODES):
        pictures = list(rng.permutation(PICTURES)[: 3 + 2 * (number % 3)])
        one, other = rng.choice(NAMES, 2, replace=False)
        row = episode_row(pictures, [one, other] * (len(pictures) // 2) + [one])
        if number % 2:
            row["turns"][2]["scored"] = True
        rows.append(row | {"id": f"0-{number}"})
    return rows


def micro_batches(method: Method, rank: int, world_size: int, micro_batch: int) -> list[MicroBatch]:
    """The share of a worker of all episodes."""
    prepared = method.backbone.prepare([draw_picture(number) for number in range(len(PICTURES))])
    pictures, rows = dict(zip(PICTURES, prepared, strict=True)), episodes()
    shares = share_of_worker(rows, rank, world_size, micro_batch)
    return [
        MicroBatch(
            method.collate(share or rows[-1:], pictures, None),
            bool(share),
            tuple(row["id"] for row in share or rows[-1:]),
        )
        for share in shares
    ]


def run_cases(folder: Path, cases: Sequence[Case], world_size: int) -> dict[str, list[StepMetrics]]:
    """Run cases on so many workers; gives the metrics of each, and leaves their checkpoints in `folder`.

    Raises:
        AssertionError: a worker failed; with what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(folder)],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    printed = [worker.communicate(timeout=LIMIT_SECONDS)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(printed)
    told = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: [StepMetrics(**metrics) for metrics in steps] for name, steps in told.items()}


def gradient(folder: Path, case: Case) -> dict[str, Tensor]:
    """What the first step of a case followed: Adam's first moment is a tenth of the gradient then, or, for
    beta 0.9, (1 - 0.9) of it."""
    tensors = load_file(folder / case.name / "step-00000001" / "state.safetensors")
    kind = "exp_avg/"
    return {
        name.removeprefix(kind): tensor / 0.1 for name, tensor in tensors.items() if name.startswith(kind)
    }


def tensors_of(folder: Path, case: Case) -> dict[str, Tensor]:
    """The values and states in the checkpoint of a case."""
    (checkpoint,) = (folder / case.name).iterdir()
    return load_file(checkpoint / "state.safetensors")


def _work(folder: Path) -> None:
    from pipelines.zero import ZeroEngine

    torch.set_num_threads(1)
    told = {}
    for settings in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        case = Case(**settings)
        config, method = case.config(), build(case)
        shapes = {name: tuple(parameter.shape) for name, parameter in method.trainable().items()}
        start = Checkpoints(Path(case.start)).newest() if case.start else None
        state = load_state(start, shapes) if start else None
        first = state.step if state else 0
        engine = ZeroEngine(method, config, state)
        method.looks = True
        batches = micro_batches(method, engine.rank, engine.world_size, config.micro_batch)
        metrics, losses = [], []
        for step in range(first, first + case.steps):
            method.infinite = [
                micro.batch for micro in batches if step == case.broken_at and case.broken in micro.episodes
            ]
            calls = [method.calls(micro.batch) for micro in batches]
            metrics.append(vars(train_step(engine, batches, calls, 1.0)))
            if case.validated:
                with engine.evaluating():
                    losses.append(mean_loss(engine, [(batches, calls)]))
        state = engine.state({"rows": EPISODES * (first + case.steps)}, first + case.steps)
        if engine.rank == 0:
            assert state is not None
            Checkpoints(folder / case.name).save(state)
            counted = {"gathered": torch.tensor(engine.gathered_elements), "losses": torch.tensor(losses)}
            save_file(counted, folder / f"{case.name}.count")
        told[case.name] = metrics
    if engine.rank == 0:
        (folder / "metrics.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
    # Gloo's threads may let go of tensors while the interpreter ends, which aborts it (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

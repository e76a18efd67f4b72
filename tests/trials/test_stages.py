"""Every stage of ZeRO, precision and place: a run that was stopped goes on to the bit.

A few of them are among the tests; these run with `make trials`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Case, run_cases, tensors_of

BEFORE, AFTER = 3, 2
WAYS: list[dict[str, Any]] = [
    *({"zero": {"stage": stage}, "precision": "fp32"} for stage in (0, 1, 2, 3)),
    *({"zero": {"stage": stage}, "precision": "bf16"} for stage in (1, 2, 3)),
    *({"zero": {"stage": stage, "offload_optimizer": "cpu"}} for stage in (1, 2, 3)),
    {"zero": {"stage": 3, "offload_parameters": "cpu"}},
]
CASES = [
    Case(f"{method} {number}", method, {"micro_batch": micro_batch, **way})
    for number, way in enumerate(WAYS)
    for method, micro_batch in (("aim", 4), ("lcl", 2))
]


@pytest.mark.timeout(900)
@pytest.mark.trial
@pytest.mark.parametrize("workers", [1, 2])
def test_run_under_every_stage_and_precision_goes_on_to_the_bit(workers: int, tmp_path: Path) -> None:
    whole = run_cases(tmp_path / "whole", [replace(case, steps=BEFORE + AFTER) for case in CASES], workers)
    run_cases(tmp_path / "stopped", [replace(case, steps=BEFORE) for case in CASES], workers)
    resumed = run_cases(
        tmp_path / "resumed",
        [replace(case, steps=AFTER, start=str(tmp_path / "stopped" / case.name)) for case in CASES],
        workers,
    )
    for case in CASES:
        assert resumed[case.name] == whole[case.name][BEFORE:], case
        wanted, found = tensors_of(tmp_path / "whole", case), tensors_of(tmp_path / "resumed", case)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), case

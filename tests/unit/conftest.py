from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Models this small lose more by handing work to threads than they gain, most of all beside others.
    torch.set_num_threads(1)

"""Progress that other processes count, as it is told where nobody has a terminal."""

from __future__ import annotations

import logging
import re
import time

import pytest
import ray

from pipelines import progress
from pipelines.progress import counting

pytestmark = pytest.mark.usefixtures("ray_cluster")

SECONDS_A_PIECE = 0.1


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.1)
    caplog.set_level(logging.INFO, logger="mmicl")
    return caplog


def test_resumed_work_tells_the_time_left_by_what_it_does_itself(lines: pytest.LogCaptureFixture) -> None:
    with counting("Working", 1000) as counter:
        for before in (0, 900):
            ray.get(counter.resume.remote(before))
            for _ in range(10):
                time.sleep(SECONDS_A_PIECE)
                ray.get(counter.add.remote(1, "well"))
        time.sleep(0.3)
    told = re.findall(r"Working: (\d+) of 1000, [\d.]+/s, (\d+) s left well", lines.text)
    assert told
    done, seconds = map(int, told[-1])
    assert done == 910
    # 90 pieces are left; counting what was done before, they would take two seconds.
    assert 0.8 * 90 * SECONDS_A_PIECE <= seconds <= 3 * 90 * SECONDS_A_PIECE


def test_work_that_has_not_begun_tells_no_time(lines: pytest.LogCaptureFixture) -> None:
    with counting("Working", 5) as counter:
        time.sleep(0.4)
        ray.get(counter.add.remote(5))
    assert "Working: 0 of 5, 0/s, unknown time left" in lines.text

from __future__ import annotations

from contextlib import ExitStack

import pytest

from mmicl_core.config.serve import ServeConfig
from pipelines.serve.errors import RateLimitError
from pipelines.serve.limits import Limits, body_limit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def send(limits: Limits, tenant: str = "anna") -> None:
    with limits.admit(tenant):
        pass


def test_a_minutes_requests_may_come_at_once_and_then_one_by_one(clock):
    limits = Limits(ServeConfig(requests_per_minute=4), clock)
    for _ in range(4):
        send(limits)
    with pytest.raises(RateLimitError, match="4 requests per minute"):
        send(limits)
    clock.now += 15
    send(limits)
    with pytest.raises(RateLimitError):
        send(limits)


@pytest.mark.parametrize("per_minute", [1, 7, 60, 1000])
def test_retry_after_is_exact(clock, per_minute):
    limits = Limits(ServeConfig(requests_per_minute=per_minute), clock)
    for _ in range(per_minute):
        send(limits)
    clock.now += 0.01
    for _ in range(20):
        with pytest.raises(RateLimitError) as refused:
            send(limits)
        clock.now += refused.value.retry_after - 0.001
        with pytest.raises(RateLimitError):
            send(limits)
        clock.now += 0.001
        send(limits)


def test_waiting_longer_does_not_save_up_more_than_a_minute(clock):
    limits = Limits(ServeConfig(requests_per_minute=3), clock)
    send(limits)
    clock.now += 3600
    for _ in range(3):
        send(limits)
    with pytest.raises(RateLimitError):
        send(limits)


def test_refused_requests_cost_nothing(clock):
    limits = Limits(ServeConfig(requests_per_minute=1), clock)
    send(limits)
    for _ in range(100):
        with pytest.raises(RateLimitError):
            send(limits)
    clock.now += 60
    send(limits)


def test_tenants_do_not_count_for_each_other(clock):
    limits = Limits(ServeConfig(requests_per_minute=1, requests_at_once=1), clock)
    with limits.admit("anna"), limits.admit("ben"):
        for name in ("anna", "ben"):
            with pytest.raises(RateLimitError):
                send(limits, name)


def test_requests_at_once_are_counted_until_they_end_however_they_end(clock):
    limits = Limits(ServeConfig(requests_at_once=2), clock)
    with limits.admit("anna"):
        with pytest.raises(KeyError), limits.admit("anna"):
            with pytest.raises(RateLimitError, match="2 requests of this key are under way") as refused:
                send(limits)
            assert refused.value.retry_after >= 1
            raise KeyError("the route failed")
        send(limits)
    with limits.admit("anna"):
        send(limits)


def test_request_refused_for_being_one_too_many_at_once_does_not_count_against_the_rate(clock):
    limits = Limits(ServeConfig(requests_at_once=1, requests_per_minute=2), clock)
    with limits.admit("anna"), pytest.raises(RateLimitError, match="under way"):
        send(limits)
    send(limits)


def test_without_limits_nobody_is_refused(clock):
    limits = Limits(ServeConfig(), clock)
    with ExitStack() as stack:
        for _ in range(10_000):
            stack.enter_context(limits.admit("anna"))


def test_any_number_of_tenants_takes_bounded_memory_and_forgets_no_debt(clock):
    limits = Limits(ServeConfig(requests_per_minute=1, requests_at_once=1), clock)
    with limits.admit("ben"):
        for number in range(5000):
            clock.now += 1
            send(limits, f"tenant{number}")
        assert len(limits) < 1100
        with pytest.raises(RateLimitError, match="under way"):
            send(limits, "ben")
    for number in range(2000):
        send(limits, f"other{number}")
    with pytest.raises(RateLimitError, match="per minute"):
        send(limits, "other0")


def test_body_limit_holds_the_largest_request_that_is_allowed():
    config = ServeConfig(max_images=3, max_image_bytes=3000)
    assert body_limit(config) > 3 * (4000 + len("data:image/png;base64,"))
    assert body_limit(config) < 3 * 4000 + 2**20 + 3 * 1024 + 1

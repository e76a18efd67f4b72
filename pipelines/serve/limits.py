"""How much one tenant may ask for, and how large a request may be.

    rate        a bucket that holds `requests_per_minute` and is refilled evenly: who was idle may send a
                minute's requests at once, and then one each 60 / requests_per_minute seconds
    at once     requests that are under way, streams until their last byte

Each ingress replica counts for itself.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mmicl_core.config.serve import ServeConfig
from pipelines.serve.errors import RateLimitError

__all__ = ["SMALL_BODY_BYTES", "Limits", "body_limit"]

TEXT_BYTES = 2**20
"""Room for everything in a body that is no picture."""
SMALL_BODY_BYTES = 64 * 1024
"""Largest body where none is expected."""
ROUNDING = 1e-9
MOST_IDLE = 1024
"""Tenants remembered although they have their whole allowance."""


def body_limit(config: ServeConfig) -> int:
    """Bytes of the largest body: all pictures that a request may hold, in base64, and text."""
    return config.max_images * (config.max_image_bytes * 4 // 3 + 1024) + TEXT_BYTES


@dataclass
class _Account:
    tokens: float
    """Requests that may be sent at once, at `at`."""
    at: float
    under_way: int = 0


class Limits:
    """Counts the requests of each tenant.

    Args:
        config: `requests_per_minute` and `requests_at_once`; None is no limit.
        clock: seconds that never go back.
    """

    def __init__(self, config: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = config.requests_per_minute
        self._at_once = config.requests_at_once
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    @contextmanager
    def admit(self, tenant: str) -> Iterator[None]:
        """Count a request, which is under way within the `with`.

        Raises:
            RateLimitError: there are too many, and when it is worth another try.
        """
        account = self._account(tenant)
        self._take(account)
        account.under_way += 1
        try:
            yield
        finally:
            account.under_way -= 1
            self._forget_idle()

    def __len__(self) -> int:
        """Tenants that are remembered."""
        return len(self._accounts)

    def _account(self, tenant: str) -> _Account:
        now, most = self._clock(), float(self._per_minute or 0)
        account = self._accounts.setdefault(tenant, _Account(most, now))
        self._accounts.move_to_end(tenant)
        account.tokens = min(most, account.tokens + (now - account.at) * most / 60)
        account.at = now
        return account

    def _take(self, account: _Account) -> None:
        if self._at_once is not None and account.under_way >= self._at_once:
            raise RateLimitError(
                f"{account.under_way} requests of this key are under way, {self._at_once} may be "
                "(serve.requests_at_once): wait until one has ended"
            )
        if self._per_minute is None:
            return
        if account.tokens < 1 - ROUNDING:
            seconds = (1 - account.tokens) * 60 / self._per_minute
            raise RateLimitError(
                f"this key may send {self._per_minute} requests per minute (serve.requests_per_minute): "
                f"the next one in {seconds:.1f} s",
                seconds,
            )
        account.tokens -= 1

    def _forget_idle(self) -> None:
        """Without requests for a minute, and with none under way, a tenant is as good as a new one."""
        now = self._clock()
        for tenant in list(self._accounts)[: max(0, len(self._accounts) - MOST_IDLE)]:
            account = self._accounts[tenant]
            if not account.under_way and now - account.at >= 60:
                del self._accounts[tenant]

"""Pictures loaded by URL: guarded, limited, and only where their owners do not object.

Each load is checked by `guard`, made by `network` and allowed by `courtesy` (robots.txt, X-Robots-Tag and
TDM-Reservation are honoured), anew for every redirect. What comes is the body as it was sent; whether it is a
picture is found out by whoever decodes it.

Nothing that lies at a URL stops a run: what cannot be had is a `Fetched` with a reason of `reasons`. The
answers are in the order of the URLs, however many are loaded at once.

Hazard: all bodies of one `fetch_many` are in memory together, so a call holds up to `max_bytes` for each of
its URLs.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from mmicl_core.config.corpus import FetchConfig
from mmicl_core.data import reasons
from mmicl_core.data.courtesy import Robots, opt_out
from mmicl_core.data.guard import Resolve, UrlRefusedError, resolve_name
from mmicl_core.data.network import Answer, GuardedClient, UrlFailedError

__all__ = ["Fetched", "Fetcher"]

WEB_PAGES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class Fetched:
    """What came of one URL: `data`, or why there is none."""

    url: str
    data: bytes | None = None
    """The body, as sent."""
    skipped: str | None = None
    """One of `reasons`."""
    detail: str = ""
    """What exactly was found."""


class Fetcher:
    """Loads pictures by URL, `config.concurrency` at a time. Close it, or use it as a context.

    Args:
        config: limits, and who to say that we are. Whether it is `enabled` is for the caller to look at.
        resolve: gives the addresses of a name.
        ssl_context: verifies servers; None trusts the authorities of the system and of `certifi`.

    Raises:
        ConfigError: an allowed network or the user agent cannot be used.
    """

    def __init__(
        self,
        config: FetchConfig,
        resolve: Resolve = resolve_name,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._client = GuardedClient(config, resolve, ssl_context)
        self._robots = Robots(self._client, config.user_agent)
        self._workers = ThreadPoolExecutor(config.concurrency, thread_name_prefix="fetch")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the loads that run, then close all connections."""
        self._workers.shutdown(cancel_futures=True)
        self._client.close()

    def fetch_many(self, urls: Sequence[str]) -> list[Fetched]:
        """Load pictures; one answer for each URL, in their order. No URL makes it raise."""
        return list(self._workers.map(self._fetch, urls))

    def _fetch(self, url: str) -> Fetched:
        deadline = time.monotonic() + self._config.timeout_seconds
        try:
            return self._follow(url, deadline)
        except UrlRefusedError as error:
            return Fetched(url, skipped=reasons.URL_REFUSED, detail=str(error))
        except UrlFailedError as error:
            return Fetched(url, skipped=reasons.URL_FAILED, detail=str(error))

    def _follow(self, url: str, deadline: float) -> Fetched:
        target = self._client.guard.check(url)
        for _ in range(1 + self._config.max_redirects):
            objection = self._robots.objection(target, deadline)
            if objection is not None:
                return Fetched(url, skipped=reasons.ROBOTS, detail=objection)
            with self._client.open(target, deadline) as answer:
                if answer.redirect is None and answer.status != 200:
                    return Fetched(url, skipped=reasons.URL_FAILED, detail=f"status {answer.status}")
                opted_out = opt_out(answer.headers, self._config.user_agent)
                if opted_out is not None:
                    return Fetched(url, skipped=reasons.OPTED_OUT, detail=opted_out)
                if answer.redirect is None:
                    return Fetched(url, self._body(answer))
                location = answer.redirect
            target = self._client.guard.check(location)
        raise UrlFailedError(f"more than {self._config.max_redirects} redirects")

    def _body(self, answer: Answer) -> bytes:
        most = self._config.max_bytes
        if answer.declared_size is not None and answer.declared_size > most:
            raise UrlFailedError(f"{answer.declared_size} bytes, and fetch.max_bytes is {most}")
        body, more = answer.read(most)
        if more:
            raise UrlFailedError(f"more than {most} bytes, which is fetch.max_bytes")
        if _is_web_page(answer, body):
            raise UrlFailedError(f"status {answer.status}, but a web page")
        return body


def _is_web_page(answer: Answer, body: bytes) -> bool:
    # The header alone is no proof: servers call pictures text/html too.
    start = body[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    return start.startswith((b"<!doctype html", b"<html")) or (kind in WEB_PAGES and start.startswith(b"<"))

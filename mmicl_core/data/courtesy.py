"""What the owners of pictures ask of those who load them: robots.txt, and headers that opt out.

Honoured are

    robots.txt          (RFC 9309) of every origin that a load comes to, by the rules for our user agent
    X-Robots-Tag        noai, noimageai, noindex, noimageindex or none, for all or for our user agent
    TDM-Reservation     1 (W3C community group, TDM Reservation Protocol)

where both headers are read before the body of a picture, and on redirects to it too. img2dataset, by which
most of such corpora are loaded, honours X-Robots-Tag by default as well. Not looked at are Crawl-delay,
`/.well-known/tdmrep.json`, and what web pages say of the pictures on them.

Hazard: a robots.txt that cannot be had forbids everything for a while, so an origin in trouble shows as
`robots.txt forbids it`; the detail tells.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import httpx
from protego import Protego

from mmicl_core.data.guard import UrlRefusedError
from mmicl_core.data.network import GuardedClient, UrlFailedError

__all__ = ["Robots", "opt_out"]

# RFC 9309, sections 2.3.1.2, 2.4 and 2.5.
MOST_REDIRECTS = 5
KEPT_SECONDS = 24 * 3600.0
MOST_BYTES = 512 * 1024
# Long enough not to ask a dead host for each of its pictures, short enough to see it come back.
TROUBLE_KEPT_SECONDS = 60.0
MOST_ORIGINS = 1024

OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
# Directives that are written like a user agent, with a colon.
WITH_A_VALUE = frozenset({"max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"})
AGENT = re.compile(r"\*|[a-z][a-z0-9_-]*")


def opt_out(headers: httpx.Headers, user_agent: str) -> str | None:
    """The header by which an owner forbids to train on what it comes with; None if there is none."""
    if "1" in headers.get_list("tdm-reservation", split_commas=True):
        return "TDM-Reservation: 1"
    ours = {"*", *AGENT.findall(user_agent.lower())}
    for line in headers.get_list("x-robots-tag"):
        spoken_to = True
        for part in line.lower().split(","):
            directive, _, rest = (piece.strip() for piece in part.partition(":"))
            # Values of directives and dates come with colons too.
            if rest and directive not in WITH_A_VALUE and AGENT.fullmatch(directive):
                spoken_to, directive = directive in ours, rest
            if spoken_to and directive in OPT_OUTS:
                return f"X-Robots-Tag: {line[:100]}"
    return None


@dataclass
class _Origin:
    """What an origin's robots.txt says; whoever asks for it holds the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    rules: Protego | None = None
    trouble: str | None = None
    """Why it cannot be had."""
    good_until: float = float("-inf")


class Robots:
    """The robots.txt of the origins met of late, each loaded once for all threads."""

    def __init__(self, client: GuardedClient, user_agent: str) -> None:
        self._client, self._user_agent = client, user_agent
        self._origins = OrderedDict[str, _Origin]()
        self._lock = threading.Lock()

    def objection(self, url: httpx.URL, deadline: float) -> str | None:
        """Why a URL may not be loaded; None if it may.

        Args:
            deadline: the point of `time.monotonic()` by which the answer is here.

        Raises:
            UrlRefusedError: the origin is not one to connect to.
        """
        place, host = url.join("/robots.txt"), url.raw_host.decode("ascii")
        origin = self._origin(str(place))
        if not origin.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return f"robots.txt cannot be had: {host} did not deliver in time"
        try:
            if time.monotonic() >= origin.good_until:
                origin.rules, origin.trouble = self._ask(place, deadline)
                kept = KEPT_SECONDS if origin.trouble is None else TROUBLE_KEPT_SECONDS
                origin.good_until = time.monotonic() + kept
            rules, trouble = origin.rules, origin.trouble
        finally:
            origin.lock.release()
        if trouble is not None:
            return f"robots.txt cannot be had: {trouble}"
        if rules is None or rules.can_fetch(str(url), self._user_agent):
            return None
        return f"robots.txt of {host}"

    def _origin(self, place: str) -> _Origin:
        with self._lock:
            origin = self._origins.setdefault(place, _Origin())
            self._origins.move_to_end(place)
            if len(self._origins) > MOST_ORIGINS:
                self._origins.popitem(last=False)
            return origin

    def _ask(self, place: httpx.URL, deadline: float) -> tuple[Protego | None, str | None]:
        """The rules, None if there are none; and why they cannot be had, if that is so."""
        target = place
        for _ in range(1 + MOST_REDIRECTS):
            try:
                with self._client.open(target, deadline) as answer:
                    if answer.redirect is None:
                        body = answer.read(MOST_BYTES) if 200 <= answer.status < 300 else None
                        return _rules(answer.status, body)
                    location = answer.redirect
                target = self._client.guard.check(location)
            except UrlFailedError as error:
                return None, str(error)
            except UrlRefusedError as error:
                if target is place:
                    raise
                return None, str(error)
        return None, f"more than {MOST_REDIRECTS} redirects"


def _rules(status: int, body: tuple[bytes, bool] | None) -> tuple[Protego | None, str | None]:
    if body is not None:
        text, cut = body
        # Half a line might forbid more, or less, than the whole.
        text = text[: text.rfind(b"\n") + 1] if cut else text
        return Protego.parse(text.decode("utf-8-sig", errors="replace")), None
    # 429 is a server that wants to be left alone, not one without a robots.txt.
    if 400 <= status < 500 and status != 429:
        return None, None
    return None, f"status {status}"

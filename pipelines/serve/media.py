"""Pictures by http(s) URL: from the hosts that the operator names, and from nowhere else.

Built on `mmicl_core.data.network`, which resolves a name once for each connection, refuses addresses that
are not public and holds one deadline for all of a load. Here it is added that

    hosts       have to be in `media_hosts`, those of redirects too; none are by default
    bodies      end at `max_image_bytes` and have to begin as a picture does, whatever their header says: no
                SVG, which can name files and other URLs, and no web pages
    loads       run on a few threads of their own, so that slow hosts hold up nothing else

Files are not read, whatever the URL.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from mmicl_core.config.corpus import FetchConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.data.guard import Guard, Resolve, resolve_name
from mmicl_core.data.network import Answer, GuardedClient
from mmicl_core.errors import ConfigError, DataError
from pipelines.serve.errors import RequestError

__all__ = ["Media"]

USER_AGENT = "mmicl"
REDIRECTS = 3
LOADS_AT_ONCE = 8
LONGEST_URL = 2048
PICTURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM", re.S)
NAMES_MORE = re.compile(r"[/:@*?#%\s]")


class Media:
    """Loads pictures for requests.

    Args:
        config: where pictures may come from, and how large and slow they may be.
        resolve: gives the addresses of a name.
        ssl_context: verifies servers; None trusts the authorities of the system and of `certifi`.

    Raises:
        ConfigError: a host or a network that is none.
    """

    def __init__(
        self,
        config: ServeConfig,
        resolve: Resolve = resolve_name,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._most_bytes, self._seconds = config.max_image_bytes, config.media_seconds
        self._hosts = frozenset(_host(text) for text in config.media_hosts)
        _check_networks(config.media_networks)
        self._guard = Guard(config.media_networks, resolve)
        self._client: GuardedClient | None = None
        if self._hosts:
            fetch = FetchConfig(
                user_agent=USER_AGENT, allowed_networks=config.media_networks, concurrency=LOADS_AT_ONCE
            )
            self._client = GuardedClient(fetch, resolve, ssl_context)
        self._workers = ThreadPoolExecutor(LOADS_AT_ONCE, thread_name_prefix="media")

    async def load(self, url: str, where: str) -> bytes:
        """The picture at a URL, encoded as it is there.

        Args:
            where: the field of the request that names it.

        Raises:
            RequestError: it must not be loaded from there, is none, is too large, or did not come in time.
        """
        # Waiting for a thread counts too, so that a request full of slow hosts ends as one of them does.
        deadline = time.monotonic() + self._seconds
        try:
            target = self._check(url)
            return await asyncio.get_running_loop().run_in_executor(
                self._workers, self._follow, target, deadline
            )
        except DataError as error:
            raise RequestError(f"{where}: {error}", where) from error

    def close(self) -> None:
        """Close all connections."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()

    def _check(self, url: str) -> httpx.URL:
        if len(url) > LONGEST_URL:
            raise DataError(f"the URL has {len(url)} characters, {LONGEST_URL} are allowed")
        target = self._guard.check(url)
        name = target.raw_host.decode("ascii")
        host = _address(name) or name
        if not self._hosts:
            raise DataError(
                "pictures are not loaded by URL here (serve.media_hosts is empty): send the picture itself "
                "as data:image/png;base64,..."
            )
        # `pictures.a.example` is below `.a.example`.
        below = (host[place:] for place, letter in enumerate(host) if letter == ".")
        if host not in self._hosts and not any(suffix in self._hosts for suffix in below):
            raise DataError(
                f"pictures are not loaded from {host[:100]!r}, which is not in serve.media_hosts: send the "
                "picture itself as data:image/png;base64,..."
            )
        return target

    def _follow(self, target: httpx.URL, deadline: float) -> bytes:
        assert self._client is not None, "no URL is checked well where no host is allowed"
        for _ in range(1 + REDIRECTS):
            with self._client.open(target, deadline) as answer:
                if answer.redirect is None:
                    return self._picture(answer)
                location = answer.redirect
            target = self._check(location)
        raise DataError(f"the URL redirects more than {REDIRECTS} times")

    def _picture(self, answer: Answer) -> bytes:
        if answer.status != 200:
            raise DataError(f"the host answers with status {answer.status}")
        too_large = f"the picture is larger than {self._most_bytes} bytes (serve.max_image_bytes)"
        if answer.declared_size is not None and answer.declared_size > self._most_bytes:
            raise DataError(f"{too_large}: it has {answer.declared_size}")
        body, more = answer.read(self._most_bytes)
        if more:
            raise DataError(too_large)
        if PICTURE.match(body) is None:
            raise DataError("what lies there does not begin as a JPEG, PNG, WEBP, GIF or BMP does")
        return body


def _host(text: str) -> str:
    """An entry of the list as hosts of URLs are compared with it."""
    name = text.removeprefix(".").removesuffix(".")
    address = _address(name)
    try:
        if address is not None and text.startswith("."):
            raise DataError("nothing lies below an address")
        if address is None and NAMES_MORE.search(name):
            raise DataError("it is more than a host")
        host = address or Guard().check(f"http://{name}/").raw_host.decode("ascii")
    except DataError as error:
        raise ConfigError(
            f"serve.media_hosts holds {text!r}, which is no host ({error}): write pictures.example.org for "
            "one, .example.org for all below it"
        ) from error
    return f".{host}" if text.startswith(".") else host


def _address(host: str) -> str | None:
    """An address in its shortest spelling; None for a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def _check_networks(networks: Sequence[str]) -> None:
    for text in networks:
        try:
            ipaddress.ip_network(text)
        except ValueError as error:
            raise ConfigError(
                f"serve.media_networks holds {text!r}, which is no network ({error}): write 10.1.0.0/16"
            ) from error

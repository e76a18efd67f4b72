"""GET requests that go only where the guard lets them, and end when they have to.

    address     a name is resolved once for each connection, which goes to an address that the guard has seen;
                TLS is verified for the name
    time        one deadline for all of a load: resolving, connecting, TLS, headers and a body that trickles
    body        counted while it comes, and never decompressed

Proxies of the environment, cookies and redirects are not followed: a redirect is a URL of a stranger again.
Built on httpcore, httpx's own engine, whose `NetworkBackend` is the place between a name and a socket.

Hazard: httpcore hands timeouts down to its backend as it gets them and looks only at `pool` itself. The
backend here takes the others for points in time, which is what makes a deadline of them.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpcore
import httpx

from mmicl_core.config.corpus import FetchConfig
from mmicl_core.data.guard import Guard, Resolve, resolve_name
from mmicl_core.errors import ConfigError, DataError

__all__ = ["Answer", "GuardedClient", "UrlFailedError"]

REDIRECTS = frozenset({301, 302, 303, 307, 308})
USER_AGENT = re.compile(r"[A-Za-z]([ -~]*[!-~])?")
KEEP_ALIVE_SECONDS = 15.0
SHORT_BYTES = 16 * 1024
# What httpcore calls the step; it is left out where a kept connection is used.
CONNECTING = "connection.connect_tcp.started"


class UrlFailedError(DataError):
    """A URL that may be loaded and could not be."""


class Answer:
    """The answer to one request: its status and headers, and the body as far as it is wanted."""

    def __init__(self, url: httpx.URL, response: httpcore.Response) -> None:
        self._pieces = response.iter_stream()
        self.status = response.status
        self.headers = httpx.Headers(response.headers)
        location = self.headers.get("location", "")
        self.redirect: str | None = None
        """Where to go instead, not yet checked; None if it is no redirect."""
        if self.status in REDIRECTS and location:
            self.redirect = _join(url, location)
        size = self.headers.get("content-length", "")
        self.declared_size = int(size) if size.isdecimal() else None
        """Bytes of the body, as the server says, and None if it does not."""

    def read(self, most: int) -> tuple[bytes, bool]:
        """The body, or its first `most` bytes, and whether there is more.

        Raises:
            UrlFailedError: the body is compressed, which a few bytes can use to become any size.
        """
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise UrlFailedError(f"the body came as {encoding[:100]!r}, where only identity was asked for")
        body = bytearray()
        for piece in self._pieces:
            body += piece
            if len(body) > most:
                return bytes(body[:most]), True
        return bytes(body), False

    def pass_over(self) -> None:
        """Take a short body that nobody reads off the connection, which can then be used again."""
        if self.status != 200 and self.declared_size is not None and self.declared_size <= SHORT_BYTES:
            for _ in self._pieces:
                pass


class GuardedClient:
    """GET requests that go only where a guard lets them; for any number of threads.

    Args:
        config: who to say that we are, what is allowed, how many requests run at once.
        resolve: gives the addresses of a name.
        ssl_context: verifies servers; None trusts the authorities of the system and of `certifi`.

    Raises:
        ConfigError: a network or the user agent cannot be used.
    """

    def __init__(
        self,
        config: FetchConfig,
        resolve: Resolve = resolve_name,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if USER_AGENT.fullmatch(config.user_agent) is None:
            raise ConfigError(
                f"fetch.user_agent is {config.user_agent!r}: it has to begin with a letter and to hold only "
                "printable ASCII characters"
            )
        self.guard = Guard(config.allowed_networks, resolve)
        self._user_agent = config.user_agent
        # The system's resolver cannot be interrupted; in a thread of its own it can be left behind.
        self._resolvers = ThreadPoolExecutor(config.concurrency, thread_name_prefix="resolve")
        self._pool = httpcore.ConnectionPool(
            ssl_context=httpcore.default_ssl_context() if ssl_context is None else ssl_context,
            max_connections=config.concurrency,
            keepalive_expiry=KEEP_ALIVE_SECONDS,
            network_backend=_GuardedBackend(self.guard, self._resolvers),
        )

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def open(self, url: httpx.URL, deadline: float) -> Iterator[Answer]:
        """Ask for a URL that `guard.check` gave; the body is read inside the `with`.

        Args:
            deadline: the point of `time.monotonic()` by which all of it is over.

        Raises:
            UrlRefusedError: its host is not one to connect to.
            UrlFailedError: there is no answer, or it breaks off, or it is not over in time.
        """
        host = url.raw_host.decode("ascii")
        try:
            response = self._ask(url, deadline)
            try:
                answer = Answer(url, response)
                yield answer
                answer.pass_over()
            finally:
                response.close()
        except (httpcore.TimeoutException, TimeoutError) as error:
            raise UrlFailedError(f"{host} did not deliver in time") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            raise UrlFailedError(f"{host} did not deliver: {str(error)[:100] or repr(error)}") from error

    def _ask(self, url: httpx.URL, deadline: float) -> httpcore.Response:
        headers = [
            # httpcore itself would leave out the brackets of an IPv6 address.
            (b"Host", url.netloc),
            (b"User-Agent", self._user_agent.encode("ascii")),
            (b"Accept", b"*/*"),
            (b"Accept-Encoding", b"identity"),
        ]
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        steps: list[str] = []
        while True:
            limits = {"connect": deadline, "read": deadline, "write": deadline, "pool": _left(deadline)}
            extensions = {"timeout": limits, "trace": lambda step, _: steps.append(step)}
            request = httpcore.Request("GET", target, headers=headers, extensions=extensions)
            try:
                return self._pool.handle_request(request)
            except (httpcore.RemoteProtocolError, httpcore.ReadError):
                # The server may close a kept connection just when it is used again; that says nothing of
                # the URL. Each failure uses one up, so the last attempt connects.
                if CONNECTING in steps:
                    raise


class _GuardedBackend(httpcore.NetworkBackend):
    """Connects to the addresses that the guard gives. All its timeouts are points of `time.monotonic()`."""

    def __init__(self, guard: Guard, resolvers: ThreadPoolExecutor) -> None:
        self._guard, self._resolvers = guard, resolvers
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        pending = self._resolvers.submit(self._guard.addresses, host, port)
        try:
            addresses = pending.result(_left(timeout))
        finally:
            pending.cancel()
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for number, address in enumerate(addresses):
            # A dead address must leave time for those behind it.
            seconds = _left(timeout) / (len(addresses) - number)
            try:
                stream = self._plain.connect_tcp(address, port, seconds, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _TimedStream(stream)
        raise failure


class _TimedStream(httpcore.NetworkStream):
    """A stream whose timeouts are points of `time.monotonic()`, so that many small steps have one end."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, _left(timeout)))

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        self._stream.close()


def _left(deadline: float | None) -> float:
    assert deadline is not None, "every request has a deadline"
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the deadline has passed")
    return seconds


def _join(url: httpx.URL, location: str) -> str:
    try:
        return str(url.join(location))
    except (httpx.InvalidURL, ValueError):
        # No URL that could be joined; the guard says so of the location itself.
        return location

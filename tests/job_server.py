"""A job server as Ray's dashboard is one, without a cluster: it says what it is told to and runs nothing."""

from __future__ import annotations

import json
import platform
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any, Self

__all__ = ["FakeJobServer", "job_of"]


@dataclass
class FakeJobServer:
    """Answers at `address` while its block runs."""

    ray: str = version("ray")
    python: str = platform.python_version()
    nodes: int = 1
    token: str | None = None
    jobs: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    """Of every answer, unless it is about the token."""

    asked: list[str] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> Self:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake._answer(self)

            def do_POST(self) -> None:
                fake._answer(self)

            def do_PUT(self) -> None:
                fake._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.asked.append(f"{request.command} {request.path}")
        code, value = self._refusal(request.headers.get("Authorization")) or self._found(
            request.command, request.path, body
        )
        text = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        request.send_response(code)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def _refusal(self, shown: str | None) -> tuple[int, str] | None:
        if self.token is None or shown == f"Bearer {self.token}":
            return None
        if shown is None:
            return 401, "Unauthorized: Missing authentication token"
        return 403, "Forbidden: Invalid authentication token"

    def _found(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, "Traceback (most recent call last):\nOSError: no space left"
        if path.startswith("/api/packages/"):
            return self._package(method, path, body)
        if path.startswith("/api/jobs/"):
            return self._job(method, path.removeprefix("/api/jobs/"), body)
        alive = {"raylet": {"state": "ALIVE"}}
        said = {
            "/api/version": {"version": "4", "ray_version": self.ray},
            "/api/v0/cluster_metadata": {"data": {"rayVersion": self.ray, "pythonVersion": self.python}},
            "/nodes?view=summary": {
                "data": {"summary": [alive] * self.nodes + [{"raylet": {"state": "DEAD"}}]}
            },
        }
        return (200, said[path]) if path in said else (404, "404: Not Found")

    def _package(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if method == "PUT":
            self.packages[path] = body
        return (200, {}) if path in self.packages else (404, "no such package")

    def _job(self, method: str, name: str, body: bytes) -> tuple[int, Any]:
        if not name:
            if method == "GET":
                return 200, self.jobs
            sent = json.loads(body)
            if any(job["submission_id"] == sent["submission_id"] for job in self.jobs):
                return 400, f"Traceback:\nValueError: Job {sent['submission_id']} already exists."
            self.jobs.append(job_of(**sent))
            return 200, {"job_id": sent["submission_id"], "submission_id": sent["submission_id"]}
        for job in self.jobs:
            if name.partition("/")[0] == job["submission_id"]:
                if name.endswith("/stop"):
                    job["status"] = "STOPPED"
                    return 200, {"stopped": True}
                return 200, job
        return 404, f"Job {name} does not exist"


def job_of(submission_id: str, status: str = "PENDING", **more: Any) -> dict[str, Any]:
    """A job as Ray tells of it."""
    told = {"type": "SUBMISSION", "status": status, "submission_id": submission_id, "job_id": None}
    return told | {"entrypoint": "", "message": None, "start_time": 1, "driver_exit_code": None} | more

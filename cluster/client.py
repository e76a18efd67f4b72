"""The job server of a cluster, as Ray's dashboard speaks it: a few questions over HTTP.

Ray's own client takes seconds to import and waits for ever for a server that does not answer. This one asks
what has to be known before and after; what Ray alone can do, sending a package and following a log, is left
to it.
"""

from __future__ import annotations

import http.client
import json
import logging
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from mmicl_core.errors import ConfigError

__all__ = ["Job", "JobServer", "SilentServerError", "ray_client"]

BUSY = 500
MISSING = 404
UNAUTHORIZED = 401
FORBIDDEN = 403
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SUBMITTED = "SUBMISSION"
# They tell of every package and connection, whatever level Ray's other loggers have.
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
SET_TOKEN = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the token of the cluster, which "
    "`ray get-auth-token` prints on its head node"
)


class SilentServerError(ConfigError):
    """The server does not answer, or not now: asking again may help."""


class _MissingError(ConfigError):
    """The server has nothing at an address."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Whoever redirects would be sent the token too."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Job:
    """A job as its cluster tells of it. Times are milliseconds since 1970."""

    name: str
    status: str
    command: str
    started: int | None
    ended_at: int | None
    exit_code: int | None
    message: str

    @property
    def ended(self) -> bool:
        """Whether nothing will follow."""
        return self.status in ENDED

    @property
    def code(self) -> int:
        """The exit code of a command that ends as this job did."""
        if self.status == "SUCCEEDED":
            return 0
        code = self.exit_code or 1
        # A process that a signal ended has a negative code, a shell makes it 128 and the signal.
        return code if code > 0 else 128 - code


class JobServer:
    """The dashboard of a cluster.

    Args:
        address: `http://HOST:8265`.
        token: what to show it, None for nothing.
        where: the token comes from, for people.
        timeout: seconds to wait for each answer.

    Raises:
        ConfigError: `address` is no URL of a dashboard.
    """

    def __init__(self, address: str, token: str | None, where: str, *, timeout: float) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            hint = "; ray:// is for Ray Client, which takes no jobs" if parts.scheme == "ray" else ""
            raise ConfigError(f"--address {address} is not http://HOST:8265, where a dashboard listens{hint}")
        self.address = address.rstrip("/")
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._where = where
        self._timeout = timeout
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ray_version(self) -> str:
        """The version of Ray that the cluster runs."""
        answer = self._ask("/api/version")
        if not isinstance(answer, dict) or "ray_version" not in answer:
            raise self._is_no_dashboard("says nothing of Ray at /api/version")
        return str(answer["ray_version"])

    def python_version(self) -> str | None:
        """The version of Python that the cluster runs; None where it does not say."""
        found = self._data("/api/v0/cluster_metadata").get("pythonVersion")
        return None if found is None else str(found)

    def nodes(self) -> int | None:
        """How many nodes are alive; None where it does not say."""
        nodes = self._data("/nodes?view=summary").get("summary")
        if nodes is None:
            return None
        states = [node.get("raylet", {}).get("state", "ALIVE") for node in nodes]
        return states.count("ALIVE")

    def jobs(self) -> list[Job]:
        """All jobs that were submitted, newest first."""
        found = [_read(job) for job in self._ask("/api/jobs/") if job.get("type") == SUBMITTED]
        return sorted(found, key=lambda job: job.started or 0, reverse=True)

    def job(self, name: str) -> Job:
        """One job.

        Raises:
            ConfigError: there is none of that name.
        """
        return _read(self._ask_for(name, ""))

    def stop(self, name: str) -> None:
        """Ask a job to end. Ray waits a few seconds for that, and then kills it.

        Raises:
            ConfigError: there is none of that name.
        """
        self._ask_for(name, "/stop", "POST")

    def _ask_for(self, name: str, what: str, method: str = "GET") -> Any:
        try:
            return self._ask(f"/api/jobs/{quote(name)}{what}", method)
        except _MissingError:
            # Of two mistakes the inner one is told.
            raise ConfigError(
                f"--address {self.address} knows no job {name}: `mmicl submit list` names those that it knows"
            ) from None

    def _data(self, route: str) -> dict[str, Any]:
        """What is in the envelope of one of the dashboard's own routes; nothing where Ray has none such."""
        try:
            answer = self._ask(route)
        except _MissingError:
            return {}
        data = answer.get("data") if isinstance(answer, dict) else None
        return data if isinstance(data, dict) else {}

    def _ask(self, route: str, method: str = "GET") -> Any:
        request = urllib.request.Request(self.address + route, method=method, headers=self.headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.read(), route) from error
        except (OSError, http.client.HTTPException) as error:
            raise SilentServerError(
                f"--address {self.address} does not answer ({getattr(error, 'reason', error)}): is the "
                "cluster up, and is the port of its dashboard, 8265, open or forwarded to this machine?"
            ) from error
        except ValueError as error:
            raise self._is_no_dashboard(f"answers {route} with something else than JSON") from error

    def _refused(self, code: int, body: bytes, route: str) -> ConfigError:
        if code == UNAUTHORIZED:
            return ConfigError(f"--address {self.address} wants a token and got none: {SET_TOKEN}")
        if code == FORBIDDEN:
            return ConfigError(f"--address {self.address} refuses the token from {self._where}: {SET_TOKEN}")
        if code >= BUSY:
            words = body.decode(errors="replace").strip().splitlines() or ["no reason given"]
            return SilentServerError(
                f"--address {self.address} cannot answer {route} now ({code}: {words[-1][:200]}): try again "
                "later, or look into the dashboard's log on the head node"
            )
        kind = _MissingError if code == MISSING else ConfigError
        return self._is_no_dashboard(f"answers {route} with status {code}", kind)

    def _is_no_dashboard(self, reason: str, kind: type[ConfigError] = ConfigError) -> ConfigError:
        return kind(
            f"--address {self.address} is not the dashboard of a Ray cluster: it {reason}; the dashboard "
            "listens at port 8265 of the head node"
        )


def ray_client(server: JobServer) -> Any:
    """Ray's own client of a server that has just answered: it waits for ever for one that does not."""
    # Ray takes a second to import, and a dry run needs none of it.
    from ray.job_submission import JobSubmissionClient

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    return JobSubmissionClient(server.address, headers=dict(server.headers))


def _read(job: dict[str, Any]) -> Job:
    return Job(
        name=job.get("submission_id") or job.get("job_id") or "",
        status=job["status"],
        command=job.get("entrypoint") or "",
        started=job.get("start_time"),
        ended_at=job.get("end_time") or None,
        exit_code=job.get("driver_exit_code"),
        message=job.get("message") or "",
    )

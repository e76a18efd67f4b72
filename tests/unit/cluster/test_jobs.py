"""A job is followed through whatever happens to the connection, and its end is the command's end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from cluster import jobs
from cluster.client import JobServer, SilentServerError
from mmicl_core.errors import ConfigError
from tests.job_server import FakeJobServer, job_of


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(jobs, "RETRY_SECONDS", 0.01)
    with FakeJobServer(jobs=[job_of("j", "RUNNING")]) as server:
        yield server


def served(fake: FakeJobServer) -> JobServer:
    return JobServer(fake.address, None, "nowhere", timeout=2)


class Script:
    """A log that is read several times: what each reading gives, and how it ends."""

    def __init__(self, fake: FakeJobServer, *readings: tuple, status: str = "SUCCEEDED", **more) -> None:
        self.readings = list(readings)
        self.end = {"status": status} | more
        self.fake = fake

    async def __call__(self, job: str) -> AsyncGenerator[str, None]:
        *texts, last = self.readings.pop(0)
        for text in texts:
            yield text
        if isinstance(last, BaseException):
            raise last
        if last == "hang":
            await asyncio.sleep(60)
        if not self.readings:
            self.fake.jobs[0] |= self.end


def test_log_is_printed_as_it_comes_and_the_end_is_told(fake, capsys):
    assert jobs.follow(served(fake), "j", Script(fake, ("one\n", "two\n", "end"))) == 0
    told = capsys.readouterr()
    assert told.out == "one\ntwo\n"
    assert told.err == "mmicl: j succeeded\n"


@pytest.mark.parametrize(
    ("status", "told", "code", "said"),
    [
        ("FAILED", 2, 2, "failed with exit code 2"),
        ("FAILED", 137, 137, "failed with exit code 137"),
        # Killed by a signal, as Python says it and as a shell does.
        ("FAILED", -9, 137, "failed with exit code -9"),
        ("FAILED", None, 1, "failed"),
        ("STOPPED", None, 1, "stopped"),
        ("SUCCEEDED", 0, 0, "succeeded"),
    ],
)
def test_exit_code_is_that_of_the_job(fake, capsys, status, told, code, said):
    script = Script(fake, ("end",), status=status, driver_exit_code=told)
    assert jobs.follow(served(fake), "j", script) == code
    assert capsys.readouterr().err == f"mmicl: j {said}\n"


def test_job_that_never_started_says_why(fake, capsys):
    script = Script(fake, ("end",), status="FAILED", message="runtime_env setup failed: no such package")
    assert jobs.follow(served(fake), "j", script) == 1
    assert "mmicl: runtime_env setup failed: no such package\n" in capsys.readouterr().err


def test_broken_connection_is_made_again_and_nothing_is_printed_twice(fake, capsys):
    script = Script(
        fake,
        ("one\ntw", RuntimeError("closed with code 1006")),
        (OSError("no route"),),
        ("one\n", "two\nthr", "ee\n", ConnectionResetError()),
        ("one\ntwo\nthree\n", "four\n", "end"),
    )
    assert jobs.follow(served(fake), "j", script) == 0
    told = capsys.readouterr()
    assert told.out == "one\ntwo\nthree\nfour\n"
    assert told.err.count("broke off, reading it again: closed with code 1006") == 1
    # Two outages, of which the first took two tries.
    assert told.err.count("broke off") == 2


def test_log_that_ends_before_its_job_is_read_again(fake, capsys):
    assert jobs.follow(served(fake), "j", Script(fake, ("one\n", "end"), ("one\n", "two\n", "end"))) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_silence_is_taken_for_a_dead_connection(fake, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "SILENCE_SECONDS", 0.05)
    assert jobs.follow(served(fake), "j", Script(fake, ("one\n", "hang"), ("one\n", "two\n", "end"))) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("one\ntwo\n", "mmicl: j succeeded\n")


def test_log_that_went_with_its_node_does_not_keep_the_end_back(fake, capsys):
    fake.jobs[0] |= {"status": "FAILED", "driver_exit_code": 3}
    script = Script(fake, *[(RuntimeError("gone"),)] * 9)
    assert jobs.follow(served(fake), "j", script) == 3
    assert len(script.readings) == 9 - jobs.TRIES_AFTER_THE_END


def test_server_that_is_gone_for_long_is_given_up_and_the_way_back_is_told(fake, monkeypatch):
    monkeypatch.setattr(jobs, "GIVE_UP_SECONDS", 0.1)

    async def tail(job: str) -> AsyncGenerator[str, None]:
        fake.status = 503
        raise RuntimeError("closed")
        yield ""

    with pytest.raises(
        SilentServerError, match=r"has been silent for .* `mmicl submit logs j --address http"
    ):
        jobs.follow(served(fake), "j", tail)


def test_server_that_is_gone_for_a_moment_is_waited_for(fake, capsys):
    script = Script(fake, ("one\n", RuntimeError("closed")), ("one\n", "two\n", "end"))

    async def tail(job: str) -> AsyncGenerator[str, None]:
        fake.status = 503 if len(script.readings) == 2 else 200
        async for text in script(job):
            yield text

    assert jobs.follow(served(fake), "j", tail) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_job_that_its_cluster_forgot_is_a_mistake(fake):
    async def tail(job: str) -> AsyncGenerator[str, None]:
        fake.jobs.clear()
        raise RuntimeError("closed")
        yield ""

    with pytest.raises(ConfigError, match="knows no job j"):
        jobs.follow(served(fake), "j", tail)


def test_interruption_leaves_the_job_alone_and_says_how_to_come_back(fake, capsys):
    script = Script(fake, ("one\n", KeyboardInterrupt()))
    assert jobs.follow(served(fake), "j", script) == 130
    told = capsys.readouterr()
    assert told.out == "one\n"
    for action in ("logs", "status", "stop"):
        assert f"`mmicl submit {action} j --address {fake.address}`" in told.err
    assert fake.jobs[0]["status"] == "RUNNING"
    assert not any("stop" in asked for asked in fake.asked)


def test_job_that_does_not_stop_is_told(fake, monkeypatch):
    monkeypatch.setattr(jobs, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(JobServer, "stop", lambda self, name: None)
    with pytest.raises(ConfigError, match="was asked to stop and is running after"):
        jobs.stop(served(fake), "j")

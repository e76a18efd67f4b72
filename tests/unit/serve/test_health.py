from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI

from pipelines.serve import health
from pipelines.serve.health import router
from tests.served import FakeGenerator, make_services


class Generator(FakeGenerator):
    """Says what it serves as late, or as badly, as a test wants."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        super().__init__()
        self.seconds, self.error, self.asked = seconds, error, 0

    async def models(self):
        self.asked += 1
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return await super().models()


def ask(services, *paths: str) -> list[httpx.Response]:
    """Answers of one server, one after the other."""
    app = FastAPI()
    app.include_router(router(services))

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [await client.get(path) for path in paths]

    return asyncio.run(run())


def test_server_that_can_answer_is_alive_and_ready(tmp_path):
    for answer in ask(make_services(tmp_path), "/healthz", "/readyz"):
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_server_without_a_generator_is_alive_and_not_ready_and_says_so_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "READY_SECONDS", 0.1)
    services = make_services(tmp_path, generator=Generator(seconds=30))
    began = time.monotonic()
    alive, ready = ask(services, "/healthz", "/readyz")
    assert time.monotonic() - began < 2
    assert alive.status_code == 200
    assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
    assert "no generator says within 0.1 s" in ready.json()["reason"]


def test_generator_that_fails_makes_the_server_unready_and_its_error_is_for_the_log(tmp_path, caplog):
    services = make_services(tmp_path, generator=Generator(error=RuntimeError("an address inside")))
    (ready,) = ask(services, "/readyz")
    assert (ready.status_code, "an address inside" in ready.text) == (503, False)
    assert "an address inside" in caplog.text


def test_bank_that_cannot_be_written_to_makes_the_server_unready(tmp_path):
    services = make_services(tmp_path)
    folder = tmp_path / "bank"
    if folder.exists():
        folder.rename(tmp_path / "elsewhere")
    folder.write_text("a file where the folder was")
    (ready,) = ask(services, "/readyz")
    assert (ready.status_code, "bank" in ready.json()["reason"]) == (503, True)
    assert str(tmp_path) not in ready.text


def test_readiness_leaves_nothing_in_the_bank(tmp_path):
    services = make_services(tmp_path)
    before = sorted(path.name for path in (tmp_path / "bank").rglob("*"))
    ask(services, "/readyz")
    assert sorted(path.name for path in (tmp_path / "bank").rglob("*")) == before


def test_many_probes_ask_the_generator_once_and_it_is_asked_again_later(tmp_path, monkeypatch):
    generator = Generator()
    services = make_services(tmp_path, generator=generator)
    ask(services, *["/readyz"] * 20)
    assert generator.asked == 1
    monkeypatch.setattr(health, "KEEP_SECONDS", 0.0)
    ask(services, *["/readyz"] * 3)
    assert generator.asked == 4


def test_readiness_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "KEEP_SECONDS", 0.0)
    generator = Generator(error=RuntimeError("not yet"))
    app = FastAPI()
    app.include_router(router(make_services(tmp_path, generator=generator)))

    async def run() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            first = await client.get("/readyz")
            generator.error = None
            return [first.status_code, (await client.get("/readyz")).status_code]

    assert asyncio.run(run()) == [503, 200]


def test_generators_that_may_all_be_absent_are_not_woken(tmp_path):
    generator = Generator()
    services = make_services(tmp_path, generator=generator)
    replicas = services.config.generator.model_copy(update={"fewest": 0})
    services = replace(services, config=services.config.model_copy(update={"generator": replicas}))
    (ready,) = ask(services, "/readyz")
    assert (ready.status_code, generator.asked) == (200, 0)


@pytest.mark.parametrize("fails", [False, True])
def test_metrics_are_told_whether_or_not_replicas_can_be_counted(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(health, "COUNT_SECONDS", 0.1)
    services = make_services(tmp_path, replicas={"generator": 2})

    async def never():
        await asyncio.sleep(30)

    if fails:
        services = replace(services, replicas=never)
    (page,) = ask(services, "/metrics")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert ('mmicl_replicas{deployment="generator"} 2.0' in page.text) is not fails
    assert "mmicl_requests_in_flight 0.0" in page.text


def test_document_of_the_api_tells_of_the_answer_that_is_not_ready(tmp_path):
    app = FastAPI()
    app.include_router(router(make_services(tmp_path)))
    paths = app.openapi()["paths"]
    assert set(paths) == {"/healthz", "/readyz", "/metrics"}
    assert set(paths["/readyz"]["get"]["responses"]) == {"200", "503"}
    assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}

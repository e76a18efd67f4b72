from __future__ import annotations

import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from mmicl_core.config.corpus import FetchConfig
from mmicl_core.data import courtesy
from mmicl_core.data.courtesy import Robots, opt_out
from mmicl_core.data.guard import UrlRefusedError
from mmicl_core.data.network import GuardedClient
from tests.web import LOCAL, Page, WebServer

AGENT = "mmicl/1.0 (+https://example.org/bot)"


@pytest.fixture
def server():
    with WebServer() as running:
        yield running


@pytest.fixture
def client():
    made = GuardedClient(
        FetchConfig(allowed_networks=LOCAL),
        resolve=lambda name: ["10.0.0.1"],
        ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    yield made
    made.close()


def objection(robots: Robots, url: str, seconds: float = 5.0) -> str | None:
    return robots.objection(httpx.URL(url), time.monotonic() + seconds)


def says(server: WebServer, client: GuardedClient, text: bytes, path: str = "/cat") -> str | None:
    """What a robots.txt of this text says of a path."""
    server.pages["/robots.txt"] = Page(text)
    return objection(Robots(client, AGENT), server.url + path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"User-agent: *\nAllow: /",
        b"User-agent: *\nDisallow: /dogs",
        b"User-agent: *\nDisallow: /\n\nUser-agent: mmicl\nDisallow:",
        b"User-agent: otherbot\nDisallow: /",
        b"User-agent: micl\nDisallow: /",
        b"<!DOCTYPE html><p>Nothing is here</p>",
        b"\xff\xfe\x00\x80" * 50,
    ],
)
def test_robots_txt_lets_in_whom_it_does_not_forbid(server, client, text):
    assert says(server, client, text) is None


@pytest.mark.parametrize(
    "text",
    [
        b"User-agent: *\nDisallow: /",
        b"\xef\xbb\xbfUser-agent: *\nDisallow: /cat",
        b"User-agent: *\nAllow: /\n\nUser-agent: MMICL\nDisallow: /c*t",
        b"User-agent: otherbot\nUser-agent: mmicl\nDisallow: /",
    ],
)
def test_robots_txt_keeps_out_whom_it_forbids(server, client, text):
    assert says(server, client, text) == "robots.txt of 127.0.0.1"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_origin_without_a_robots_txt_lets_everybody_in(server, client, status):
    server.pages["/robots.txt"] = Page(b"User-agent: *\nDisallow: /", status)
    assert objection(Robots(client, AGENT), f"{server.url}/cat") is None


@pytest.mark.parametrize("status", [429, 500, 503, 304])
def test_robots_txt_that_cannot_be_had_keeps_everybody_out(server, client, status):
    server.pages["/robots.txt"] = Page(b"", status)
    said = objection(Robots(client, AGENT), f"{server.url}/cat")
    assert said == f"robots.txt cannot be had: status {status}"


def test_robots_txt_of_a_server_that_hangs_up_keeps_everybody_out(server, client):
    server.pages["/robots.txt"] = lambda handler: None
    said = objection(Robots(client, AGENT), f"{server.url}/cat")
    assert said is not None
    assert said.startswith("robots.txt cannot be had: 127.0.0.1 did not deliver: ")


def test_compressed_robots_txt_is_not_taken_for_an_empty_one(server, client):
    server.pages["/robots.txt"] = Page(b"\x1f\x8b", headers=(("Content-Encoding", "gzip"),))
    said = objection(Robots(client, AGENT), f"{server.url}/cat")
    assert said is not None
    assert "came as 'gzip'" in said


def test_robots_txt_is_followed_to_where_it_lies_but_not_into_the_house(server, client):
    server.pages["/rules"] = Page(b"User-agent: *\nDisallow: /")
    server.pages["/robots.txt"] = Page(status=301, headers=(("Location", "/rules"),))
    assert objection(Robots(client, AGENT), f"{server.url}/cat") == "robots.txt of 127.0.0.1"
    server.pages["/robots.txt"] = Page(status=301, headers=(("Location", "http://169.254.169.254/"),))
    said = objection(Robots(client, AGENT), f"{server.url}/cat")
    assert (
        said
        == "robots.txt cannot be had: 169.254.169.254 is at 169.254.169.254, which is not a public address"
    )
    server.pages["/robots.txt"] = Page(status=301, headers=(("Location", "/robots.txt"),))
    said = objection(Robots(client, AGENT), f"{server.url}/cat")
    assert said == "robots.txt cannot be had: more than 5 redirects"


def test_origin_that_must_not_be_connected_to_is_refused_rather_than_asked(client):
    with pytest.raises(UrlRefusedError, match=r"inside\.example is at 10\.0\.0\.1"):
        objection(Robots(client, AGENT), "http://inside.example/cat")


def test_long_robots_txt_is_read_up_to_its_last_whole_line(server, client, monkeypatch):
    text = b"User-agent: *\nDisallow: /dog\nDisallow: /cat\n"
    for most, forbidden in ((len(text), True), (len(text) - 1, False), (len(text) - 4, False)):
        monkeypatch.setattr(courtesy, "MOST_BYTES", most)
        assert (says(server, client, text) is not None) == forbidden
        # Cut in its middle the last line would forbid `/c` and all that begins so.
        assert says(server, client, text, "/cow") is None
        assert says(server, client, text, "/dog") is not None


def test_robots_txt_is_asked_for_once_however_many_want_it(server, client):
    crowd = threading.Barrier(8, timeout=5)
    robots = Robots(client, AGENT)

    def ask(number):
        crowd.wait()
        return objection(robots, f"{server.url}/{number}?q=/robots.txt#here")

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == [None] * 8
    assert [asked.path for asked in server.asked] == ["/robots.txt"]


def test_one_who_waits_for_another_s_robots_txt_does_not_wait_past_the_deadline(server, client):
    asked, over = threading.Event(), threading.Event()

    def stall(handler):
        asked.set()
        over.wait(5)

    server.pages["/robots.txt"] = stall
    robots = Robots(client, AGENT)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(objection, robots, f"{server.url}/cat")
        assert asked.wait(5)
        said = objection(robots, f"{server.url}/dog", seconds=0.05)
        over.set()
        assert first.result() is not None
    assert said == "robots.txt cannot be had: 127.0.0.1 did not deliver in time"


def test_trouble_is_remembered_for_a_while_and_then_asked_about_again(server, client, monkeypatch):
    server.pages["/robots.txt"] = Page(status=503)
    robots = Robots(client, AGENT)
    assert objection(robots, f"{server.url}/cat") is not None
    server.pages["/robots.txt"] = Page(b"")
    assert objection(robots, f"{server.url}/cat") is not None
    later = time.monotonic() + courtesy.TROUBLE_KEPT_SECONDS
    monkeypatch.setattr(courtesy.time, "monotonic", lambda: later)
    assert robots.objection(httpx.URL(f"{server.url}/cat"), later + 5) is None
    assert len(server.asked) == 2


def test_only_the_origins_met_of_late_are_remembered(server, client, monkeypatch):
    monkeypatch.setattr(courtesy, "MOST_ORIGINS", 2)
    robots = Robots(client, AGENT)
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.3", "127.0.0.1", "127.0.0.2"]
    really = client.open

    def open_here(url, deadline):
        return really(url.copy_with(host="127.0.0.1"), deadline)

    monkeypatch.setattr(client, "open", open_here)
    for host in hosts:
        assert objection(robots, f"http://{host}:{server.port}/cat") is None
    # The first stays, since it is met again and again; the second has to be asked a second time.
    assert len(server.asked) == 4


def headers(*lines: str, name: str = "X-Robots-Tag") -> httpx.Headers:
    return httpx.Headers([(name, line) for line in lines])


@pytest.mark.parametrize(
    "lines",
    [
        ["noai"],
        ["noimageai"],
        ["noindex"],
        ["noimageindex"],
        ["none"],
        ["NoAI"],
        ["nofollow, noai"],
        ["nofollow", "noimageai"],
        ["mmicl: noai"],
        ["MMICL:noai, nofollow"],
        ["mmicl: nofollow, noai"],
        ["*: noai"],
        ["otherbot: noindex, mmicl: noai"],
        ["otherbot: noindex", "noai"],
        ["max-snippet: 5, noai"],
        ["unavailable_after: Mon, 25 Jun 2035 15:00:00 PST, noai"],
    ],
)
def test_x_robots_tag_opts_out_for_all_or_for_our_name(lines):
    said = opt_out(headers(*lines), AGENT)
    assert said is not None
    assert said.startswith("X-Robots-Tag: ")


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [""],
        ["all"],
        ["nofollow, noarchive"],
        ["noaix"],
        ["otherbot: noai"],
        ["mmicl2: noai"],
        ["otherbot: nofollow, noai"],
        ["otherbot: max-snippet: 5, noai"],
        ["mmicl: nofollow, otherbot: noai"],
        ["max-image-preview: none"],
        [", ,:,"],
    ],
)
def test_x_robots_tag_of_other_content_or_for_another_name_does_not_count(lines):
    assert opt_out(headers(*lines), AGENT) is None


@pytest.mark.parametrize(("value", "reserved"), [("1", True), (" 1 ", True), ("0", False), ("10", False)])
def test_tdm_reservation_opts_out(value, reserved):
    said = opt_out(headers(value, name="tdm-reservation"), AGENT)
    assert said == ("TDM-Reservation: 1" if reserved else None)

from __future__ import annotations

import ssl
import threading
import time

import pytest

from mmicl_core.config.corpus import FetchConfig
from mmicl_core.data import reasons
from mmicl_core.data.fetch import Fetched, Fetcher
from tests.web import LOCAL, Page, WebServer, no_name

# Nothing here looks into a picture.
CAT = b"\x89PNG of a cat"
MOST = 4096


@pytest.fixture
def server():
    with WebServer({"/cat": Page(CAT)}) as running:
        yield running


@pytest.fixture
def fetch():
    """Loads URLs with a fetcher of these settings."""

    def load(*urls, resolve=no_name, allowed_networks=LOCAL, **settings) -> list[Fetched]:
        config = FetchConfig(allowed_networks=allowed_networks, **{"max_bytes": MOST} | settings)
        with Fetcher(config, resolve, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)) as fetcher:
            return fetcher.fetch_many(urls)

    return load


def redirect(location: str, status: int = 302, **headers: str) -> Page:
    return Page(status=status, headers=(("Location", location), *headers.items()))


def test_answers_are_in_the_order_of_the_urls(server, fetch):
    bodies = [b"picture %d" % number for number in range(20)]
    server.pages |= {f"/{number}": Page(body) for number, body in enumerate(bodies)}
    urls = [f"{server.url}/{number}" for number in range(20)]
    urls[7:7] = ["cat.jpg", f"{server.url}/nothing"]
    found = fetch(*urls, concurrency=5)
    assert [answer.url for answer in found] == urls
    assert [answer.data for answer in found] == [*bodies[:7], None, None, *bodies[7:]]
    assert [answer.skipped for answer in found[7:9]] == [reasons.URL_REFUSED, reasons.URL_FAILED]
    assert all(answer.skipped is None for answer in found if answer.data is not None)


def test_as_many_are_loaded_at_once_as_configured(server, fetch):
    # Each of four waits until all four are being loaded; one after the other would never end.
    crowd = threading.Barrier(4, timeout=5)
    inside, most = [], []

    def wait(handler):
        inside.append(handler)
        crowd.wait()
        most.append(len(inside))
        crowd.wait()
        inside.remove(handler)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")

    server.pages["/meet"] = wait
    found = fetch(*[f"{server.url}/meet"] * 8, concurrency=4)
    assert [answer.data for answer in found] == [b"1"] * 8
    assert most == [4] * 8


def test_bad_urls_are_refused_with_a_reason_and_never_raise(fetch):
    urls = ["", "cat.jpg", "file:///etc/passwd", "http://[", "http://\ud800/", "http://127.1/"]
    urls += ["http://a:b@c/", "http://169.254.169.254/", "https://[::1]/", "http://xn--a/"]
    found = fetch(*urls, resolve=lambda name: ["10.0.0.1"], allowed_networks=())
    assert [(answer.url, answer.data, answer.skipped) for answer in found] == [
        (url, None, reasons.URL_REFUSED) for url in urls
    ]
    assert all(answer.detail for answer in found)


def test_local_server_is_out_of_reach_unless_its_network_is_allowed(server, fetch):
    (answer,) = fetch(f"{server.url}/cat", allowed_networks=())
    assert (answer.data, answer.skipped) == (None, reasons.URL_REFUSED)
    assert not server.asked
    assert fetch(f"{server.url}/cat") == [Fetched(f"{server.url}/cat", CAT)]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_as_far_as_configured(server, fetch, status):
    server.pages |= {
        "/1": redirect("/2", status),
        "/2": redirect(f"{server.url}/3", status),
        "/3": redirect("cat", status),
    }
    assert fetch(f"{server.url}/1", max_redirects=3) == [Fetched(f"{server.url}/1", CAT)]
    (answer,) = fetch(f"{server.url}/1", max_redirects=2)
    assert (answer.skipped, answer.detail) == (reasons.URL_FAILED, "more than 2 redirects")


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "//10.0.0.1/",
        "http://inside.example/",
        "http://2130706433/",
        "http://[::ffff:10.0.0.1]/",
        "http://user:secret@93.184.216.34/",
        "file:///etc/passwd",
        "http://[",
    ],
)
def test_redirect_is_checked_like_the_first_url(server, fetch, location):
    server.pages["/away"] = redirect(location)
    (answer,) = fetch(f"{server.url}/away", resolve=lambda name: ["192.168.0.1"])
    assert (answer.data, answer.skipped) == (None, reasons.URL_REFUSED)
    assert server.paths() == ["/away"]


def test_redirect_without_a_location_is_a_failure(server, fetch):
    server.pages["/away"] = Page(status=302)
    (answer,) = fetch(f"{server.url}/away")
    assert (answer.skipped, answer.detail) == (reasons.URL_FAILED, "status 302")


@pytest.mark.parametrize("status", [201, 204, 403, 404, 410, 500, 503])
def test_any_other_status_is_a_failure_that_is_told(server, fetch, status):
    # Pages of errors say noindex of themselves, not of the picture.
    server.pages["/cat"] = Page(b"", status, headers=(("X-Robots-Tag", "noindex"),))
    (answer,) = fetch(f"{server.url}/cat")
    assert (answer.data, answer.skipped, answer.detail) == (None, reasons.URL_FAILED, f"status {status}")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html; charset=utf-8", b"\r\n  <p>This picture has moved</p>"),
        ("image/jpeg", b"\xef\xbb\xbf\n<!DOCTYPE html><html>"),
        ("application/octet-stream", b"<HTML><body>"),
    ],
)
def test_web_page_is_a_failure_whatever_it_is_called(server, fetch, kind, body):
    server.pages["/cat"] = Page(body, headers=(("Content-Type", kind),))
    (answer,) = fetch(f"{server.url}/cat")
    assert (answer.skipped, answer.detail) == (reasons.URL_FAILED, "status 200, but a web page")


def test_picture_that_is_called_a_web_page_is_a_picture(server, fetch):
    server.pages["/cat"] = Page(CAT, headers=(("Content-Type", "text/html"),))
    assert fetch(f"{server.url}/cat")[0].data == CAT


@pytest.mark.parametrize("declares_size", [True, False])
def test_body_over_the_limit_is_a_failure_and_one_of_it_is_not(server, fetch, declares_size):
    server.pages["/big"] = Page(bytes(MOST + 1), declares_size=declares_size)
    server.pages["/fits"] = Page(bytes(MOST), declares_size=declares_size)
    big, fits = fetch(f"{server.url}/big", f"{server.url}/fits")
    assert (big.data, big.skipped) == (None, reasons.URL_FAILED)
    assert str(MOST) in big.detail
    assert fits.data == bytes(MOST)


def test_body_that_is_declared_too_large_is_not_waited_for(server, fetch):
    over = threading.Event()

    def announce(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n")
        over.wait(5)

    server.pages["/huge"] = announce
    (answer,) = fetch(f"{server.url}/huge")
    over.set()
    assert answer.detail == f"99999999 bytes, and fetch.max_bytes is {MOST}"


def test_one_deadline_holds_for_all_redirects_together(server, fetch):
    over = threading.Event()

    def dawdle(handler):
        over.wait(0.1)
        handler.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: /slow\r\nContent-Length: 0\r\n\r\n")

    server.pages["/slow"] = dawdle
    began = time.monotonic()
    (answer,) = fetch(f"{server.url}/slow", timeout_seconds=0.35, max_redirects=100)
    over.set()
    assert (answer.skipped, answer.detail) == (reasons.URL_FAILED, "127.0.0.1 did not deliver in time")
    assert time.monotonic() - began < 2


def test_robots_txt_is_obeyed_before_a_picture_is_asked_for(server, fetch):
    server.pages["/robots.txt"] = Page(b"User-agent: mmicl\nDisallow: /private/")
    server.pages["/private/cat"] = Page(CAT)
    server.pages["/around"] = redirect("/private/cat")
    urls = [f"{server.url}{path}" for path in ("/cat", "/private/cat", "/around")]
    found = fetch(*urls, concurrency=1)
    assert [answer.skipped for answer in found] == [None, reasons.ROBOTS, reasons.ROBOTS]
    assert [asked.path for asked in server.asked] == ["/robots.txt", "/cat", "/around"]
    assert fetch(urls[1], user_agent="other")[0].data == CAT


def test_robots_txt_in_trouble_forbids_and_tells_why(server, fetch):
    server.pages["/robots.txt"] = Page(status=500)
    (answer,) = fetch(f"{server.url}/cat")
    assert (answer.skipped, answer.detail) == (reasons.ROBOTS, "robots.txt cannot be had: status 500")
    assert server.paths() == []


@pytest.mark.parametrize(
    ("name", "value"), [("X-Robots-Tag", "noai"), ("X-Robots-Tag", "mmicl: noai"), ("tdm-reservation", "1")]
)
def test_owner_opts_out_by_a_header_of_the_picture_or_of_a_redirect_to_it(server, fetch, name, value):
    server.pages["/mine"] = Page(CAT, headers=((name, value),))
    server.pages["/to-mine"] = redirect("/cat", **{name: value})
    for path in ("/mine", "/to-mine"):
        (answer,) = fetch(server.url + path)
        assert (answer.data, answer.skipped) == (None, reasons.OPTED_OUT)
        assert answer.detail.lower().endswith(value)
    assert fetch(server.url + "/mine", user_agent="other")[0].skipped == (
        None if value.startswith("mmicl") else reasons.OPTED_OUT
    )


def test_fetcher_keeps_connections_and_what_robots_txt_said(server):
    config = FetchConfig(allowed_networks=LOCAL, concurrency=1)
    server.pages |= {"/around": redirect("/cat"), "/gone": Page(b"Nothing is here", 404)}
    with Fetcher(config) as fetcher:
        for path, body in (("/cat", CAT), ("/around", CAT), ("/gone", None), ("/cat", CAT)):
            assert fetcher.fetch_many([server.url + path])[0].data == body
    assert [asked.path for asked in server.asked] == [
        "/robots.txt",
        "/cat",
        "/around",
        "/cat",
        "/gone",
        "/cat",
    ]
    assert len({asked.connection for asked in server.asked}) == 1

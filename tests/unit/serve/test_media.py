from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import threading
import time

import pytest

from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import ConfigError
from pipelines.serve.errors import RequestError, status_of
from pipelines.serve.media import LOADS_AT_ONCE, Media
from tests.served import png
from tests.web import LOCAL, Page, WebServer, no_name

WHERE = "messages.0.content.1.image_url.url"
CAT = png(7)
LIMIT = 2048
# Reading the authorities of the system takes longer than all the rest.
TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture
def server():
    with WebServer({"/cat": Page(CAT)}) as running:
        yield running


@pytest.fixture
def media():
    """Makes loaders that are closed in the end. They may reach the server of the test by its address."""
    made = []

    def make(resolve=no_name, **settings) -> Media:
        settings = {"media_hosts": ("127.0.0.1",), "media_networks": LOCAL, "media_seconds": 5.0} | settings
        made.append(Media(ServeConfig(max_image_bytes=LIMIT, **settings), resolve, TRUSTS_NOBODY))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def connections(monkeypatch):
    """All connections that are tried; none is made."""
    tried = []

    def refuse(address, *_, **__):
        tried.append(address)
        raise ConnectionRefusedError("connected")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


def load(media: Media, url: str) -> bytes:
    return asyncio.run(media.load(url, WHERE))


def refusal(media: Media, url: str) -> str:
    with pytest.raises(RequestError) as refused:
        load(media, url)
    assert refused.value.param == WHERE
    assert str(refused.value).startswith(f"{WHERE}: ")
    assert 400 <= status_of(refused.value)[0] < 500
    return str(refused.value)


# What a stranger writes, and the host that an operator would have to allow for it.
HOSTILE = [
    ("file:///etc/passwd", "a.example"),
    ("/etc/passwd", "a.example"),
    ("../../etc/passwd", "a.example"),
    ("C:\\pictures\\cat.png", "a.example"),
    ("\\\\server\\share\\cat.png", "a.example"),
    ("//a.example/cat.png", "a.example"),
    ("ftp://a.example/cat.png", "a.example"),
    ("gopher://a.example:70/1", "a.example"),
    ("data:image/png;base64,AAAA", "a.example"),
    ("javascript:alert(1)", "a.example"),
    ("dict://a.example:11211/stats", "a.example"),
    ("s3://bucket/cat.png", "a.example"),
    ("unix:///var/run/docker.sock", "a.example"),
    ("http+unix://%2Fvar%2Frun%2Fdocker.sock/images", "a.example"),
    ("", "a.example"),
    ("http:", "a.example"),
    ("http:///a.example", "a.example"),
    # Addresses of this machine, in every spelling that a resolver takes.
    ("http://127.0.0.1/", "127.0.0.1"),
    ("http://127.0.0.1./", "127.0.0.1"),
    ("http://127.8.8.8/", "127.8.8.8"),
    ("http://2130706433/", "127.0.0.1"),
    ("http://0x7f000001/", "127.0.0.1"),
    ("http://0x7f.0.0.1/", "127.0.0.1"),
    ("http://0177.0.0.1/", "127.0.0.1"),
    ("http://017700000001/", "127.0.0.1"),
    ("http://127.1/", "127.0.0.1"),
    ("http://127.0.1/", "127.0.0.1"),
    ("http://0/", "127.0.0.1"),
    ("http://0.0.0.0/", "0.0.0.0"),
    ("http://127%2e0%2e0%2e1/", "127.0.0.1"),
    ("http://127\u30020\u30020\u30021/", "127.0.0.1"),
    ("http://127\uff0e0\uff0e0\uff0e1/", "127.0.0.1"),
    ("http://\u2460\u2461\u2466.0.0.1/", "127.0.0.1"),
    ("http://[::1]/", "::1"),
    ("http://[::]/", "::"),
    ("http://[0:0:0:0:0:0:0:1]/", "::1"),
    ("http://[::ffff:127.0.0.1]/", "::ffff:127.0.0.1"),
    ("http://[::ffff:7f00:1]/", "::ffff:127.0.0.1"),
    ("http://[::127.0.0.1]/", "::127.0.0.1"),
    ("http://[64:ff9b::7f00:1]/", "64:ff9b::7f00:1"),
    ("http://[2002:7f00:1::]/", "2002:7f00:1::"),
    # Neighbours, and what clouds tell their machines.
    ("http://10.0.0.1/", "10.0.0.1"),
    ("http://172.16.0.1/", "172.16.0.1"),
    ("http://192.168.0.1/", "192.168.0.1"),
    ("http://100.64.0.1/", "100.64.0.1"),
    ("http://[fd00::1]/", "fd00::1"),
    ("http://169.254.169.254/latest/meta-data/", "169.254.169.254"),
    ("http://2852039166/latest/meta-data/", "169.254.169.254"),
    ("http://0xa9fea9fe/latest/meta-data/", "169.254.169.254"),
    ("http://[::ffff:169.254.169.254]/", "::ffff:169.254.169.254"),
    ("http://[fe80::1]/", "fe80::1"),
    ("http://[fe80::1%25eth0]/", "fe80::1"),
    ("http://[fd00:ec2::254]/", "fd00:ec2::254"),
    ("http://168.63.129.16/", "168.63.129.16"),
    ("http://100.100.100.200/", "100.100.100.200"),
    ("http://192.0.0.192/", "192.0.0.192"),
    ("http://224.0.0.1/", "224.0.0.1"),
    ("http://255.255.255.255/", "255.255.255.255"),
    # Names that lie there.
    ("http://localhost/", "localhost"),
    ("http://LOCALHOST./", "localhost"),
    ("http://loop.example/", "loop.example"),
    ("http://loop6.example/", "loop6.example"),
    ("http://metadata.google.internal/computeMetadata/v1/", "metadata.google.internal"),
    ("http://mixed.example/", "mixed.example"),
    ("http://mapped.example/", ".example"),
    # An allowed host, or so it seems.
    ("http://a.example@127.0.0.1/", "a.example"),
    ("http://a.example:80@127.0.0.1/", "a.example"),
    ("http://user:secret@a.example/", "a.example"),
    ("http://a.example%40@127.0.0.1/", "a.example"),
    ("http://a.example\\@127.0.0.1/", "a.example"),
    ("http://a.example#@127.0.0.1/", "b.example"),
    ("http://127.0.0.1#a.example/", "a.example"),
    ("http://127.0.0.1?a.example/", "a.example"),
    ("http://a.example.evil.test/", "a.example"),
    ("http://evila.example/", ".a.example"),
    ("http://a.example/", ".a.example"),
    ("http://xa.example/", "a.example"),
    ("http://b.a.example/", "a.example"),
    ("http://\u0430.example/", "a.example"),
    ("http://a..example/", "a.example"),
    ("http://a.example../", "a.example"),
    ("http://a.example%00.evil.test/", "a.example"),
    ("http://a.example\r\nHost: inside/", "a.example"),
    ("http://a.example/\r\nX: y", "a.example"),
    ("http://a.example/\x00", "a.example"),
    (" http://a.example/", "a.example"),
    ("http://a.example\t/", "a.example"),
    # Other doors of an allowed host.
    ("http://a.example:22/", "a.example"),
    ("http://a.example:6379/", "a.example"),
    ("http://a.example:8265/api/jobs/", "a.example"),
    ("http://a.example:0/", "a.example"),
    ("http://a.example:99999/", "a.example"),
    ("http://a.example:80:80/", "a.example"),
    # Too much of anything.
    ("http://a.example/" + "a" * 5000, "a.example"),
    ("http://" + "a" * 100_000, "a.example"),
    ("http://" + "a." * 200 + "example/", ".example"),
    ("http://[" + ":" * 1000, "a.example"),
    ("http://\ud800/", "a.example"),
]
ADDRESSES = {
    "a.example": ["93.184.216.34"],
    "localhost": ["127.0.0.1"],
    "loop.example": ["127.0.0.1"],
    "loop6.example": ["::1"],
    "metadata.google.internal": ["169.254.169.254"],
    "mixed.example": ["93.184.216.34", "10.0.0.1"],
    "mapped.example": ["::ffff:10.0.0.1"],
}


@pytest.mark.parametrize(("url", "allowed"), HOSTILE)
def test_hostile_url_is_refused_without_a_connection_even_where_its_host_is_allowed(
    media, connections, url, allowed
):
    told = refusal(media(ADDRESSES.__getitem__, media_hosts=(allowed,), media_networks=()), url)
    assert connections == []
    assert "secret" not in told
    assert len(told) < 500


@pytest.mark.parametrize(
    "url", ["https://a.example/cat.png", "http://localhost/", *(url for url, _ in HOSTILE)]
)
def test_without_hosts_nothing_is_loaded_and_no_name_is_resolved(media, connections, url):
    refusal(media(media_hosts=()), url)
    assert connections == []


def test_refusal_of_a_host_says_what_to_do(media, connections):
    told = refusal(media(media_hosts=("a.example",)), "http://b.example/cat.png")
    assert "'b.example', which is not in serve.media_hosts" in told
    assert "data:image/png;base64" in told
    assert "serve.media_hosts is empty" in refusal(media(media_hosts=()), "http://b.example/cat.png")


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://a.example/cat", "a.example"),
        ("http://A.Example./cat", "a.example"),
        ("http://a.example/cat", "A.EXAMPLE."),
        ("http://b.a.example/cat", ".a.example"),
        ("http://c.b.a.example/cat", ".A.example"),
        ("http://b\u00fccher.example/cat", "b\u00fccher.example"),
        ("http://xn--bcher-kva.example/cat", "b\u00fccher.example"),
        ("http://93.184.216.34/cat", "93.184.216.34"),
        ("http://[2606:2800:220:0::1946]/cat", "2606:2800:220::1946"),
    ],
)
def test_allowed_host_is_connected_to_at_the_address_that_was_checked(media, connections, url, allowed):
    def resolve(name: str) -> list[str]:
        return ["93.184.216.34"]

    refusal(media(resolve, media_hosts=(allowed,), media_networks=()), url)
    assert connections in ([("93.184.216.34", 80)], [("2606:2800:220::1946", 80)])


def test_picture_of_an_allowed_host_is_loaded(media, server):
    assert load(media(), f"{server.url}/cat") == CAT


def test_second_answer_of_the_name_server_has_no_say(media, server):
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    loader = media(lambda name: next(answers), media_hosts=("rebinding.example",))
    assert load(loader, f"http://rebinding.example:{server.port}/cat") == CAT
    assert next(answers) == ["169.254.169.254"], "a load resolves its name once"


def test_name_that_moves_to_a_private_address_is_refused_at_the_next_connection(media, server):
    server.pages["/cat"] = Page(CAT, declares_size=False)
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    loader = media(lambda name: next(answers), media_hosts=("rebinding.example",))
    url = f"http://rebinding.example:{server.port}/cat"
    assert load(loader, url) == CAT
    assert "is at 169.254.169.254, which is not a public address" in refusal(loader, url)
    assert server.paths() == ["/cat"]


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/",
        "http://inside.example:{port}/cat",
        "http://allowed.evil.test/",
        "//inside.example/cat",
        "file:///etc/passwd",
        "ftp://allowed.example/cat",
        "data:image/png;base64,AAAA",
        "http://2130706433:{port}/cat",
        "http://[::1]:{port}/cat",
        "http://allowed.example@127.0.0.1:{port}/cat",
        "https://allowed.example:22222222/",
        "http://[",
    ],
)
@pytest.mark.parametrize("status", [301, 307])
def test_redirect_goes_nowhere_where_a_url_may_not_go(media, server, location, status):
    server.pages["/away"] = Page(status=status, headers=(("Location", location.format(port=server.port)),))
    loader = media(lambda name: ["127.0.0.1"], media_hosts=("allowed.example",))
    refusal(loader, f"http://allowed.example:{server.port}/away")
    assert server.paths() == ["/away"]


def test_redirect_to_an_allowed_host_whose_address_is_private_is_refused(media, server):
    server.pages["/away"] = Page(status=302, headers=(("Location", "http://b.example/cat"),))
    table = {"a.example": ["127.0.0.1"], "b.example": ["10.0.0.1"]}
    loader = media(table.__getitem__, media_hosts=(".example",))
    told = refusal(loader, f"http://a.example:{server.port}/away")
    assert "b.example is at 10.0.0.1, which is not a public address" in told


@pytest.mark.parametrize(("redirects", "loaded"), [(3, True), (4, False)])
def test_few_redirects_are_followed(media, server, redirects, loaded):
    for number in range(redirects):
        server.pages[f"/{number}"] = Page(status=302, headers=(("Location", f"/{number + 1}"),))
    server.pages[f"/{redirects}"] = Page(CAT)
    if loaded:
        assert load(media(), f"{server.url}/0") == CAT
    else:
        assert "redirects more than 3 times" in refusal(media(), f"{server.url}/0")


def test_redirect_in_a_circle_ends(media, server):
    server.pages["/round"] = Page(status=302, headers=(("Location", "/round"),))
    assert "redirects more than 3 times" in refusal(media(), f"{server.url}/round")
    assert len(server.paths()) == 4


@pytest.mark.parametrize("declares_size", [True, False])
@pytest.mark.parametrize(("size", "fits"), [(LIMIT, True), (LIMIT + 1, False), (2**24, False)])
def test_body_is_taken_up_to_the_limit(media, server, declares_size, size, fits):
    body = CAT + bytes(size - len(CAT))
    server.pages["/big"] = Page(body, declares_size=declares_size)
    if fits:
        assert load(media(), f"{server.url}/big") == body
    else:
        assert f"larger than {LIMIT} bytes (serve.max_image_bytes)" in refusal(media(), f"{server.url}/big")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
def test_compressed_body_is_not_unpacked(media, server, encoding):
    bomb = gzip.compress(CAT + bytes(10**7))[:LIMIT]
    server.pages["/bomb"] = Page(bomb, headers=(("Content-Encoding", encoding),))
    assert "only identity was asked for" in refusal(media(), f"{server.url}/bomb")


@pytest.mark.parametrize("kind", ["image/png", "image/svg+xml", "text/html"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<?xml version='1.0'?><svg/>",
        b"\xef\xbb\xbf<!DOCTYPE html><html>",
        b"<html>\x89PNG\r\n\x1a\n",
        b"%PDF-1.7",
        b"\x00\x00\x00\x20ftypavif",
        b"RIFF\x00\x00\x00\x00WAVE",
        b"root:x:0:0:root",
        b'{"AccessKeyId": "..."}',
        b"II*\x00",
        b" \x89PNG\r\n\x1a\n",
    ],
)
def test_what_does_not_begin_as_a_picture_is_refused_whatever_its_header_says(media, server, body, kind):
    server.pages["/odd"] = Page(body, headers=(("Content-Type", kind),))
    told = refusal(media(), f"{server.url}/odd")
    assert "does not begin as a JPEG, PNG, WEBP, GIF or BMP does" in told
    # Nor does the error carry what lies there to the caller.
    assert "root" not in told and "AccessKeyId" not in told


@pytest.mark.parametrize("start", [b"\xff\xd8\xff\xe0", b"RIFF\x01\x02\x03\x04WEBPVP8 ", b"GIF89a", b"BM"])
def test_other_kinds_of_pictures_are_taken(media, server, start):
    server.pages["/one"] = Page(start, headers=(("Content-Type", "application/octet-stream"),))
    assert load(media(), f"{server.url}/one") == start


@pytest.mark.parametrize("status", [204, 206, 401, 404, 500])
def test_answer_other_than_200_is_an_error_of_the_request(media, server, status):
    server.pages["/bad"] = Page(CAT if status > 206 else b"", status)
    assert f"status {status}" in refusal(media(), f"{server.url}/bad")


def test_host_that_cannot_be_reached_or_found_is_an_error_of_the_request(media, connections):
    def resolve(name):
        raise OSError("Name or service not known")

    assert "did not deliver: connected" in refusal(media(), "http://127.0.0.1:9/cat")
    told = refusal(media(resolve, media_hosts=("a.example",)), "http://a.example/cat")
    assert "a.example did not deliver" in told


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"]
)
def test_trickle_of_bytes_ends_in_time(media, server, start):
    over = threading.Event()

    def trickle(handler):
        handler.wfile.write(start)
        while not over.wait(0.02):
            handler.wfile.write(b"1")

    server.pages["/slow"] = trickle
    began = time.monotonic()
    told = refusal(media(media_seconds=0.3), f"{server.url}/slow")
    over.set()
    assert "did not deliver in time" in told
    assert 0.3 <= time.monotonic() - began < 2


def test_many_slow_loads_take_few_threads_and_end_in_time_and_the_loop_stays_free(media, server):
    over = threading.Event()
    server.pages["/slow"] = lambda handler: over.wait(20)
    loader = media(media_seconds=1.0)

    async def all_of_them() -> tuple[float, int]:
        loads = [asyncio.ensure_future(loader.load(f"{server.url}/slow", WHERE)) for _ in range(40)]
        began = before = time.monotonic()
        longest, at_once = 0.0, 0
        while not all(one.done() for one in loads):
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, before = max(longest, now - before), now
            if now - began < 0.8:
                at_once = len(server.asked)
        for one in loads:
            assert isinstance(one.exception(), RequestError)
        return longest, at_once

    began = time.monotonic()
    longest, at_once = asyncio.run(all_of_them())
    took = time.monotonic() - began
    over.set()
    assert took < 3
    assert longest < 0.4, "the event loop waited for a host"
    assert at_once == LOADS_AT_ONCE


@pytest.mark.parametrize(
    "host",
    [
        "",
        ".",
        "*",
        "*.example",
        "http://a.example",
        "a.example/cat",
        "a.example:80",
        "a b",
        ".10.0.0.1",
        "127.1",
    ],
)
def test_host_of_the_settings_that_is_none_is_an_error_of_configuration(host):
    with pytest.raises(ConfigError, match=r"serve\.media_hosts holds"):
        Media(ServeConfig(media_hosts=(host,)))


def test_network_of_the_settings_that_is_none_is_an_error_of_configuration():
    with pytest.raises(ConfigError, match=r"serve\.media_networks holds '10\.0\.0\.0/33'"):
        Media(ServeConfig(media_networks=("10.0.0.0/33",)))

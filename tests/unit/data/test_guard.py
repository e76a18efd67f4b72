from __future__ import annotations

import random
from ipaddress import ip_address

import httpx
import pytest

from mmicl_core.data.guard import Guard, UrlRefusedError
from mmicl_core.errors import ConfigError
from tests.web import no_name


def admit(url: str, guard: Guard) -> list[str]:
    """The addresses that a load of the URL may connect to."""
    parsed = guard.check(url)
    port = parsed.port or {"http": 80, "https": 443}[parsed.scheme]
    return guard.addresses(parsed.raw_host.decode(), port)


def names(**addresses: str) -> Guard:
    """A guard for whom names resolve like this; `__` is a dot."""
    table = {name.replace("__", "."): found.split() for name, found in addresses.items()}
    return Guard(resolve=table.__getitem__)


NOT_WEB = [
    "",
    "cat.jpg",
    "/etc/passwd",
    "C:\\pictures\\cat.jpg",
    "//example.com/cat.jpg",
    " http://example.com/cat.jpg",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    "gopher://example.com:70/1",
    "ftp://example.com/cat.jpg",
    "javascript:alert(1)",
    "s3://bucket/cat.jpg",
    "http:",
    "http:example.com",
    "http:///etc/passwd",
    "http://example.com\r\nHost: inside/",
]
CREDENTIALS = [
    "http://user:secret@example.com/",
    "http://user@example.com/",
    "http://:@example.com/",
    "http://example.com@127.0.0.1/",
    "http://example.com%40@127.0.0.1/",
    "http://example.com\\@127.0.0.1/",
    "http://user:secret@xn--a/",
]
ODD_HOSTS = [
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://0x/",
    "http://017700000001/",
    "http://127.1/",
    "http://127.0.1/",
    "http://0177.0.0.1/",
    "http://127.0.0.0x1/",
    "http://127.0.0.1.1/",
    "http://127.0.0.1../",
    "http://134744072/",
    "http://127%2e0%2e0%2e1/",
    "http://[::1%25lo]/",
    "http://[fe80::1%25eth0]/",
    "http://[::ffff:127.0.0.1/",
    "http://[v1.x]/",
    "http://exa mple.com/",
    "http://example..com/",
    "http://.example.com/",
    "http://./",
    "http://%6c%6f%63%61%6c/",
    "http://" + "a" * 64 + ".com/",
    "http://" + "a." * 127 + "com/",
    "http://\uff11\uff12\uff17.0.0.1/",
    "http://\u24db\u24de\u24d2\u24d0\u24db/",
    "http://\ud800/",
    "http://example.com/\ud800",
    "http://example.com:99999/",
    "http://example.com:0/",
    "http://example.com:-80/",
    "http://example.com:80:80/",
]
PRIVATE = [
    "http://127.0.0.1/",
    "http://127.0.0.1./",
    "https://127.8.8.8/",
    "http://127\u30020\u30020\u30021/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://100.64.0.1/",
    "http://100.100.100.200/",
    "http://168.63.129.16/",
    "http://169.254.169.254/latest/meta-data/",
    "http://172.16.0.1/",
    "http://192.0.0.9/",
    "http://192.0.0.192/",
    "http://192.88.99.1/",
    "http://192.168.0.1/",
    "http://198.18.0.1/",
    "http://203.0.113.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[::]/",
    "http://[::1]/",
    "http://[::127.0.0.1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[::ffff:0:127.0.0.1]/",
    "http://[64:ff9b::127.0.0.1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::8.8.8.8]/",
    "http://[100::1]/",
    "http://[2001:0:4136:e378::1]/",
    "http://[2001:1::1]/",
    "http://[2001:20::1]/",
    "http://[2001:db8::1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[3fff::1]/",
    "http://[5f00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
]


@pytest.mark.parametrize("url", NOT_WEB)
def test_guard_refuses_what_is_no_address_of_the_web(url):
    with pytest.raises(UrlRefusedError, match=r"is not a URL|does not begin with|neither a name"):
        Guard().check(url)


@pytest.mark.parametrize("url", CREDENTIALS)
def test_guard_refuses_credentials_and_does_not_repeat_them(url):
    with pytest.raises(UrlRefusedError, match="carries credentials") as refused:
        Guard().check(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ODD_HOSTS)
def test_guard_refuses_unusual_spellings_of_a_host_without_resolving_them(url):
    with pytest.raises(UrlRefusedError, match=r"is not a URL|usual spelling|does not exist"):
        admit(url, Guard(resolve=no_name))


@pytest.mark.parametrize("url", PRIVATE)
def test_guard_refuses_addresses_that_are_not_public(url):
    with pytest.raises(UrlRefusedError, match="not a public address"):
        admit(url, Guard(resolve=no_name))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://93.184.216.34/cat.jpg", "93.184.216.34"),
        ("https://93.184.216.34.:443/", "93.184.216.34"),
        ("https://[2606:2800:220::1946]/", "2606:2800:220::1946"),
        ("http://[::ffff:93.184.216.34]/", "::ffff:93.184.216.34"),
        ("http://[64:ff9b::93.184.216.34]/", "64:ff9b::93.184.216.34"),
        ("http://[2002:5db8:d822::1]/", "2002:5db8:d822::1"),
    ],
)
def test_guard_admits_public_addresses(url, address):
    (admitted,) = admit(url, Guard(resolve=no_name))
    assert ip_address(admitted) == ip_address(address)


@pytest.mark.parametrize(
    "addresses",
    [
        "127.0.0.1",
        "::1",
        "93.184.216.34 10.0.0.1",
        "10.0.0.1 93.184.216.34",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
    ],
)
def test_guard_refuses_a_name_of_which_any_address_is_not_public(addresses):
    with pytest.raises(UrlRefusedError, match="not a public address"):
        admit("http://trap.example/", names(trap__example=addresses))


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "localhost.", "LocalHost."])
def test_guard_looks_at_the_address_of_localhost_however_it_is_written(host):
    with pytest.raises(UrlRefusedError, match=r"localhost is at 127\.0\.0\.1"):
        admit(f"http://{host}/", names(localhost="127.0.0.1"))


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("b\u00fccher.example", "xn--bcher-kva.example"),
        ("my_bucket.example", "my_bucket.example"),
        ("1.2.3.example", "1.2.3.example"),
    ],
)
def test_guard_resolves_a_name_in_its_plain_form(host, name):
    asked = []
    guard = Guard(resolve=lambda name: asked.append(name) or ["93.184.216.34"])
    parsed = guard.check(f"http://{host}/cat.jpg?of=it")
    assert guard.addresses(parsed.raw_host.decode(), 80) == ["93.184.216.34"]
    assert asked == [name]
    assert (parsed.netloc, parsed.raw_path) == (name.encode(), b"/cat.jpg?of=it")


def test_guard_keeps_to_the_ports_of_the_web():
    for port in (80, 443):
        assert admit(f"http://93.184.216.34:{port}/", Guard()) == ["93.184.216.34"]
    for port in (22, 25, 6379, 8080):
        with pytest.raises(UrlRefusedError, match=f"port {port} of 93.184.216.34 is neither 80 nor 443"):
            admit(f"http://93.184.216.34:{port}/", Guard())


def test_allowed_networks_open_their_addresses_and_ports_and_no_others():
    guard = Guard(("10.1.0.0/16", "fd00::/8"), resolve=lambda name: ["10.1.2.3", "93.184.216.34"])
    assert admit("http://10.1.2.3:9000/", guard) == ["10.1.2.3"]
    assert len(admit("http://[::ffff:10.1.2.3]:9000/", guard)) == 1
    assert admit("http://[fd00::1]/", guard) == ["fd00::1"]
    assert admit("http://mixed.example/", guard) == ["10.1.2.3", "93.184.216.34"]
    for url in ("http://10.2.0.1/", "http://[::1]/", "http://mixed.example:9000/", "http://0x0a010203/"):
        with pytest.raises(UrlRefusedError):
            admit(url, guard)


@pytest.mark.parametrize("network", ["", "inside", "10.1.2.3/16", "10.0.0.0/33"])
def test_allowed_network_that_is_none_is_an_error_of_configuration(network):
    with pytest.raises(ConfigError, match=r"fetch\.allowed_networks holds .*write 10\.1\.0\.0/16"):
        Guard((network,))


def test_guard_answers_whatever_text_it_is_given():
    rng = random.Random(0)
    pieces = [
        "http://",
        "https:",
        "//",
        "@",
        ":",
        "[",
        "]",
        "%",
        "%2",
        "xn--",
        "127.0.0.1",
        "::1",
        ".",
        "..",
        "a",
    ]
    pieces += ["\u3002", "\u200d", "\ud800", "\x00", "\\", "/", "?", "#", "0x", "-", "_", "\u00df", " ", "80"]
    guard = Guard(resolve=lambda name: ["93.184.216.34"])
    admitted = 0
    for _ in range(5000):
        url = rng.choice(["", "http://", "https://a"]) + "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        try:
            assert admit(url, guard) in (["93.184.216.34"],)
        except UrlRefusedError:
            continue
        admitted += 1
        assert httpx.URL(url).scheme in ("http", "https")
    assert 100 < admitted < 4900

from __future__ import annotations

import datetime
import gzip
import socket
import ssl
import threading
import time

import httpx
import pytest

from mmicl_core.config.corpus import FetchConfig
from mmicl_core.data.guard import UrlRefusedError
from mmicl_core.data.network import GuardedClient, UrlFailedError
from mmicl_core.errors import ConfigError
from tests.web import LOCAL, Page, WebServer, no_name

MOST = 1000
# Reading the authorities of the system takes longer than all the rest.
TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture
def server():
    with WebServer({"/cat": Page(b"a cat")}) as running:
        yield running


@pytest.fixture
def connect():
    """Makes clients that are closed in the end."""
    clients = []

    def make(resolve=no_name, ssl_context=TRUSTS_NOBODY, **settings) -> GuardedClient:
        client = GuardedClient(FetchConfig(allowed_networks=LOCAL, **settings), resolve, ssl_context)
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


def load(client: GuardedClient, url: str, seconds: float = 5.0) -> bytes:
    with client.open(client.guard.check(url), time.monotonic() + seconds) as answer:
        return answer.read(MOST)[0]


def test_connection_goes_to_the_checked_address_and_speaks_of_the_name(server, connect, monkeypatch):
    connected = []
    really = socket.create_connection

    def record(address, *args, **kwargs):
        connected.append(address)
        return really(("127.0.0.1", server.port), *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", record)
    client = connect(lambda name: ["93.184.216.34"])
    assert load(client, "http://Pictures.example./cat") == b"a cat"
    assert connected == [("93.184.216.34", 80)]
    assert server.asked[0].headers["Host"] == "pictures.example"


def test_a_second_answer_of_the_name_server_has_no_say(server, connect):
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    client = connect(lambda name: next(answers))
    url = f"http://rebinding.example:{server.port}/cat"
    assert [load(client, url), load(client, url)] == [b"a cat", b"a cat"]
    assert next(answers) == ["169.254.169.254"], "one connection resolves its name once"


def test_another_connection_checks_its_address_anew(server, connect):
    server.pages["/cat"] = Page(b"a cat", declares_size=False)
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    client = connect(lambda name: next(answers))
    url = f"http://rebinding.example:{server.port}/cat"
    assert load(client, url) == b"a cat"
    with pytest.raises(UrlRefusedError, match=r"rebinding\.example is at 169\.254\.169\.254"):
        load(client, url)
    assert server.paths() == ["/cat"]


def test_address_that_does_not_answer_leaves_its_turn_to_the_next(server, connect, monkeypatch):
    really = socket.create_connection

    def refuse_the_first(address, *args, **kwargs):
        if address[0] == "127.0.0.2":
            raise ConnectionRefusedError("nobody is here")
        return really(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", refuse_the_first)
    two = f"http://two.example:{server.port}/cat"
    assert load(connect(lambda name: ["127.0.0.2", "127.0.0.1"]), two) == b"a cat"
    with pytest.raises(UrlFailedError, match=r"two\.example did not deliver: nobody is here"):
        load(connect(lambda name: ["127.0.0.2"]), two)


def test_proxies_of_the_environment_are_not_used(server, connect, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert load(connect(), f"{server.url}/cat") == b"a cat"


def test_request_says_who_asks_and_brings_no_cookies(server, connect):
    server.pages["/cat"] = Page(b"a cat", headers=(("Set-Cookie", "seen=1; Path=/"),))
    client = connect(user_agent="mmicl/1.0 (+https://example.org/bot)")
    load(client, f"{server.url}/cat")
    load(client, f"{server.url}/cat")
    for asked in server.asked:
        assert asked.headers["User-Agent"] == "mmicl/1.0 (+https://example.org/bot)"
        assert asked.headers["Accept-Encoding"] == "identity"
        assert "Cookie" not in asked.headers


@pytest.mark.parametrize("user_agent", ["", "m\u00fcmicl", "mmicl\r\nCookie: a=b", "mmicl ", "1"])
def test_user_agent_that_no_header_can_hold_is_an_error_of_configuration(connect, user_agent):
    with pytest.raises(ConfigError, match=r"fetch\.user_agent is .* begin with a letter"):
        connect(user_agent=user_agent)


def test_compressed_body_is_refused_and_not_unpacked(server, connect):
    bomb = gzip.compress(bytes(10**6))
    server.pages["/bomb"] = Page(bomb, headers=(("Content-Encoding", "gzip"),))
    with pytest.raises(UrlFailedError, match="came as 'gzip', where only identity was asked for"):
        load(connect(), f"{server.url}/bomb")


@pytest.mark.parametrize("size", [MOST, MOST + 1, 10**6])
@pytest.mark.parametrize("declares_size", [True, False])
def test_body_is_read_up_to_the_limit_and_tells_whether_there_is_more(server, connect, size, declares_size):
    server.pages["/big"] = Page(bytes(size), declares_size=declares_size)
    client = connect()
    with client.open(client.guard.check(f"{server.url}/big"), time.monotonic() + 5) as answer:
        assert answer.read(MOST) == (bytes(MOST), size > MOST)
    assert load(client, f"{server.url}/cat") == b"a cat"


def test_body_that_breaks_off_is_a_failure(server, connect):
    server.pages["/half"] = lambda handler: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    )
    with pytest.raises(UrlFailedError, match="127.0.0.1 did not deliver: peer closed connection"):
        load(connect(), f"{server.url}/half")


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"]
)
def test_trickle_of_bytes_ends_at_the_deadline(server, connect, start):
    over = threading.Event()

    def trickle(handler):
        handler.wfile.write(start)
        while not over.wait(0.02):
            handler.wfile.write(b"1")

    server.pages["/slow"] = trickle
    began = time.monotonic()
    with pytest.raises(UrlFailedError, match="did not deliver in time"):
        load(connect(), f"{server.url}/slow", seconds=0.2)
    over.set()
    # Each byte comes well within any timeout of a single read.
    assert 0.2 <= time.monotonic() - began < 1.5


def test_name_server_that_does_not_answer_ends_at_the_deadline(connect):
    over = threading.Event()
    began = time.monotonic()
    with pytest.raises(UrlFailedError, match=r"slow\.example did not deliver in time"):
        load(connect(lambda name: [str(over.wait(10))]), "http://slow.example/", seconds=0.1)
    over.set()
    assert time.monotonic() - began < 1.5


def test_kept_connection_that_the_server_has_given_up_is_replaced(server, connect):
    def answer_once(handler):
        connections = [asked.connection for asked in server.asked]
        if connections.count(connections[-1]) == 1:
            handler.close_connection = False
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\na dog")

    server.pages["/dog"] = answer_once
    client = connect()
    assert [load(client, f"{server.url}/dog") for _ in range(3)] == [b"a dog"] * 3
    assert len(server.asked) == 5


def test_server_that_hangs_up_at_once_is_not_asked_again(server, connect):
    server.pages["/dog"] = lambda handler: None
    with pytest.raises(UrlFailedError, match="did not deliver: Server disconnected"):
        load(connect(), f"{server.url}/dog")
    assert server.paths() == ["/dog"]


@pytest.mark.parametrize("answer", [[], OSError("Name or service not known")])
def test_name_without_an_address_is_a_failure(connect, answer):
    def resolve(name):
        if isinstance(answer, OSError):
            raise answer
        return answer

    with pytest.raises(UrlFailedError, match=r"nowhere\.example did not deliver: .*(no address|not known)"):
        load(connect(resolve), "http://nowhere.example/")


@pytest.mark.parametrize("location", ["http://[", "//[::1", "http://\ud800/", "/a b", "?\u00fc"])
def test_odd_redirect_is_passed_on_for_the_guard_to_judge(server, connect, location):
    raw = location.encode("utf-8", "surrogatepass").decode("latin-1")
    server.pages["/odd"] = Page(status=302, headers=(("Location", raw),))
    client = connect()
    with client.open(client.guard.check(f"{server.url}/odd"), time.monotonic() + 5) as answer:
        redirect = answer.redirect
    assert redirect is not None
    try:
        assert client.guard.check(redirect).port == server.port
    except UrlRefusedError:
        assert "[" in location or "\ud800" in location


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A PEM file of a key and its own certificate for `pictures.example`."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pictures.example")])
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.example")]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_tls_is_spoken_with_the_name_and_verified_for_it(server, connect, certificate):
    asked_for = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    server.encrypt(context)
    trusting = ssl.create_default_context(cafile=certificate)
    client = connect(lambda name: ["127.0.0.1"], trusting)
    assert load(client, f"https://pictures.example.:{server.port}/cat") == b"a cat"
    assert asked_for == ["pictures.example"]
    for wrong in (f"https://other.example:{server.port}/cat", f"https://127.0.0.1:{server.port}/cat"):
        with pytest.raises(UrlFailedError, match="certificate verify failed"):
            load(client, wrong)
    with pytest.raises(UrlFailedError, match="certificate verify failed"):
        load(connect(lambda name: ["127.0.0.1"], None), f"https://pictures.example:{server.port}/cat")
    assert server.paths() == ["/cat"]


def test_ipv6_host_keeps_its_brackets_in_the_request(server, connect, monkeypatch):
    really = socket.create_connection
    monkeypatch.setattr(
        socket,
        "create_connection",
        lambda address, *rest, **more: really(("127.0.0.1", server.port), *rest, **more),
    )
    assert load(connect(), "http://[2606:2800:220::1946]/cat") == b"a cat"
    assert httpx.URL(f"http://{server.asked[0].headers['Host']}").host == "2606:2800:220::1946"

"""Files of packs that are not what they say, and connections on which no honest client speaks."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mmicl_core.bank.encoding import decode, encode
from mmicl_core.bank.entries import Pack, digest_arrays
from tests.hostile_files import EXTREME_NUMBERS

__all__ = ["FORGERIES", "RAW", "exchange", "forged_pack"]


def forged_pack(seed: int, good: bytes) -> tuple[str, bytes]:
    """How a pack was changed, and its file. Every way comes once in as many seeds as there are ways.

    Args:
        good: an exported pack.
    """
    names = list(FORGERIES)
    name = names[seed % len(names)]
    return f"{seed}: {name}", FORGERIES[name](random.Random(seed), good)


def other_length(chance: random.Random, good: bytes) -> bytes:
    """Of the header, which begins with its own."""
    length = chance.choice((0, 1, 7, len(good), len(good) - 8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + good[8:]


def cut(chance: random.Random, good: bytes) -> bytes:
    return chance.choice(
        (b"", good[:7], good[:8], good[: chance.randrange(len(good))], good + b"\0", good * 2)
    )


def bits_flipped(chance: random.Random, good: bytes) -> bytes:
    data = bytearray(good)
    for _ in range(chance.choice((1, 3, 30))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def no_header(chance: random.Random, good: bytes) -> bytes:
    text = chance.choice(
        (
            b"",
            b"null",
            b"[]",
            b"{}",
            b'{"__metadata__":null}',
            b'{"__metadata__":{}}',
            b'{"__metadata__":{"pack":"{}"}}',
            b'{"__metadata__":{"pack":"' + b"[" * 5000 + b'"}}',
            b"[" * 50_000,
            b'{"a":' * 50_000,
            b"\xff" * 100,
            b'{"a":1,"a":1}',
            b"NaN",
            chance.randbytes(100),
        )
    )
    return struct.pack("<Q", len(text)) + text + good[-64:]


def other_places(chance: random.Random, good: bytes) -> bytes:
    """Where arrays lie, of which type and shape they are."""
    header, rest = _taken_apart(good)
    names = [name for name in header if name != "__metadata__"]
    place = header[chance.choice(names)]
    change: dict[str, Any] = chance.choice(
        (
            {"data_offsets": [0, 0]},
            {"data_offsets": [0, 2**63]},
            {"data_offsets": [-8, 8]},
            {"data_offsets": place["data_offsets"][::-1]},
            {"data_offsets": [0.5, 8]},
            {"data_offsets": header[names[0]]["data_offsets"]},
            {"shape": [2**31 - 1, 2**31 - 1]},
            {"shape": [2**63, 4]},
            {"shape": [0, 4]},
            {"shape": place["shape"][::-1]},
            {"shape": place["shape"] + [1]},
            {"shape": [-1, -4]},
            {"dtype": chance.choice(("F64", "I64", "BOOL", "F8_E4M3", "x", None))},
            {"other": 1},
        )
    )
    place |= change
    return _put_together(header, rest)


def other_arrays(chance: random.Random, good: bytes) -> bytes:
    """Names of them."""
    header, rest = _taken_apart(good)
    name = chance.choice([name for name in header if name != "__metadata__"])
    new = chance.choice((None, "-1", "1e9", "..", "", "vectors", "00", "x" * 1000, "\u0660"))
    place = header.pop(name)
    if new is not None:
        header[new] = place
    return _put_together(header, rest)


def other_entry(chance: random.Random, good: bytes) -> bytes:
    """What the pack says of itself, while its arrays stay as they are."""
    header, rest = _taken_apart(good)
    entry = json.loads(header["__metadata__"]["pack"])
    name = chance.choice(list(entry))
    if chance.random() < 0.2:
        del entry[name]
    else:
        entry[name] = chance.choice(ODD_VALUES)
    header["__metadata__"]["pack"] = json.dumps(entry)
    return _put_together(header, rest)


def other_id(chance: random.Random, good: bytes) -> bytes:
    pack = decode(good, "a pack")
    ids = ("pack-" + "0" * 32, "pack-..", "a", "pack-" + "f" * 31 + "g", "-" * 80, pack.entry.id.upper())
    header, rest = _taken_apart(good)
    entry = json.loads(header["__metadata__"]["pack"])
    header["__metadata__"]["pack"] = json.dumps(entry | {"id": chance.choice(ids)})
    return _put_together(header, rest)


def other_numbers(chance: random.Random, good: bytes) -> bytes:
    """A pack that agrees with itself in every way, and whose fused tokens no model made."""
    pack = decode(good, "a pack")
    width = pack.fused[0].shape[1]
    shape = chance.choice(((1, 1), (3, width + 1), (3, width - 1), (5000, width), (2, 100_000), (3, width)))
    value = chance.choice((0.0, 1.0, -1e38, 3e38, 1e-45, float("nan"), float("inf")))
    fused = tuple(np.full(shape, value, np.float32) for _ in pack.fused)
    vectors = pack.vectors
    if chance.random() < 0.5:
        vectors = chance.choice(
            (None, np.full((len(fused), chance.choice((1, width, 500))), value, np.float32))
        )
    entry = replace(
        pack.entry,
        id=f"pack-{chance.getrandbits(128):032x}",
        tokens_fused=(shape[0],) * len(fused),
        tokens_full=(chance.choice((0, 1, 2**31 - 1)),) * len(fused),
        digest=digest_arrays(fused, vectors),
        model=chance.choice((pack.entry.model, "", "other@x")),
        created=chance.choice((0, 253_402_300_799)),
    )
    return encode(Pack(entry, fused, vectors))


def more_arrays(chance: random.Random, good: bytes) -> bytes:
    """More demonstrations than any request could bring."""
    pack = decode(good, "a pack")
    count = chance.choice((300, 5000))
    fused = (pack.fused[0],) * count
    entry = replace(
        pack.entry,
        id=f"pack-{chance.getrandbits(128):032x}",
        tokens_fused=(len(fused[0]),) * count,
        tokens_full=(9,) * count,
        digest=digest_arrays(fused, None),
    )
    return encode(Pack(entry, fused, None))


FORGERIES: Mapping[str, Callable[[random.Random, bytes], bytes]] = {
    make.__name__.replace("_", " "): make
    for make in (
        other_length,
        cut,
        bits_flipped,
        no_header,
        other_places,
        other_arrays,
        other_entry,
        other_id,
        other_numbers,
        more_arrays,
    )
}
"""Ways to change a pack."""

ODD_VALUES: tuple[Any, ...] = (
    None,
    "",
    "../../etc/passwd",
    "a" * 100_000,
    "\ud800",
    "\0",
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1e308,
    float("nan"),
    [],
    [0],
    [2**31 - 1, 2**31 - 1],
    {},
    {"format": "3"},
    {"a": {"b": 1}},
    True,
)


def _taken_apart(good: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(good[:8], "little")
    return json.loads(good[8:end]), good[end:]


def _put_together(header: Mapping[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


# Connections.


def exchange(url: str, sent: bytes, seconds: float, ends: bool = True) -> bytes:
    """Send bytes and read until the server closes the connection.

    Args:
        ends: whether the client says that no more comes.

    Raises:
        TimeoutError: the server keeps the connection open, or answers without an end.
    """
    place = urlsplit(url)
    assert place.hostname is not None and place.port is not None, url
    deadline = time.monotonic() + seconds
    answer = b""
    with socket.create_connection((place.hostname, place.port), timeout=seconds) as connection:
        try:
            connection.sendall(sent)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                answer += piece
                connection.settimeout(max(0.01, deadline - time.monotonic()))
        except ConnectionError:
            # It hung up, which is an answer too.
            pass
    return answer


def _post(*lines: str, body: bytes = b"", path: str = "/v1/chat/completions") -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: a", "content-type: application/json", "connection: close", *lines]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


CHUNKED = "transfer-encoding: chunked"
RAW: Mapping[str, bytes] = {
    "nothing": b"",
    "one byte": b"\0",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 500,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 50,
    "no end of a line": b"GET /" + b"a" * 100_000,
    "no end of headers": b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
    "many headers": b"GET /healthz HTTP/1.1\r\nconnection: close\r\n" + b"a: b\r\n" * 2000 + b"\r\n",
    "a body that is shorter": _post("content-length: 100", body=b"{}"),
    "a body that is longer": _post("content-length: 2", body=b"{}" * 50),
    "a body that does not come": _post("content-length: 1000000000"),
    "a negative length": _post("content-length: -1", body=b"{}"),
    "a length of many digits": _post("content-length: " + "9" * 5000, body=b"{}"),
    "a length that is none": _post("content-length: 0x10", body=b"{}"),
    "two lengths": _post("content-length: 2", "content-length: 3", body=b"{}"),
    "a length and chunks": _post("content-length: 2", CHUNKED, body=b"2\r\n{}\r\n0\r\n\r\n"),
    "a chunk that is shorter": _post(CHUNKED, body=b"ff\r\n{}\r\n0\r\n\r\n"),
    "a chunk that is longer": _post(CHUNKED, body=b"1\r\n{}\r\n0\r\n\r\n"),
    "a chunk of negative size": _post(CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n"),
    "a chunk of huge size": _post(CHUNKED, body=b"f" * 16 + b"\r\n{}"),
    "a chunk of more digits": _post(CHUNKED, body=b"f" * 5000 + b"\r\n{}"),
    "a chunk of no size": _post(CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunks without an end": _post(CHUNKED, body=b"2\r\n{}\r\n"),
    "chunks of one byte": _post(CHUNKED, body=b"1\r\n \r\n" * 20_000 + b"2\r\n{}\r\n0\r\n\r\n"),
    "trailers": _post(CHUNKED, body=b"2\r\n{}\r\n0\r\nauthorization: Bearer x\r\n\r\n"),
    "two encodings": _post("transfer-encoding: gzip, chunked", body=b"2\r\n{}\r\n0\r\n\r\n"),
    "a second request inside": _post("content-length: 2", body=b"{}GET /metrics HTTP/1.1\r\n\r\n"),
    "an expectation": _post("expect: 100-continue", "content-length: 2", body=b"{}"),
    "another expectation": _post("expect: a-miracle", "content-length: 2", body=b"{}"),
    "a header with a zero": _post("a: \0", "content-length: 2", body=b"{}"),
    "a header without a name": _post(": x", "content-length: 2", body=b"{}"),
    "a folded header": _post("a: b", " c", "content-length: 2", body=b"{}"),
    "an absolute address": _post("content-length: 2", body=b"{}", path="http://other.example/v1/models"),
    "no path": b"GET HTTP/1.1\r\n\r\n",
    "another version": b"GET /healthz HTTP/9.9\r\n\r\n",
    "an old version": b"GET /v1/models HTTP/1.0\r\n\r\n",
    "a websocket": (
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ),
    "an address in bytes": b"GET /v1/models/\xff\xfe\x00 HTTP/1.1\r\nconnection: close\r\n\r\n",
    "many requests": b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n" * 500,
    "another method": b"BREW" * 20 + b" / HTTP/1.1\r\n\r\n",
    "random bytes": random.Random(0).randbytes(10_000),
    "numbers": struct.pack(f">{len(EXTREME_NUMBERS)}I", *EXTREME_NUMBERS),
}
"""What is sent, by what is wrong with it."""

"""Requests that want to break a server, each made of a seed: equal seeds, equal bytes.

hostile_picture     a hostile file, written into a request in a hostile way
picture_request     a picture at one of the places that take one
hostile_request     a body, a path or a header that is no good
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.hostile_files import GOOD_PICTURE, PICTURES

__all__ = [
    "CHAT",
    "EMBEDDINGS",
    "IMPORT",
    "PACKS",
    "TEXTS",
    "HostilePicture",
    "HostileRequest",
    "chat_body",
    "data_uri",
    "hostile_picture",
    "hostile_request",
    "picture_request",
]

CHAT, PACKS, EMBEDDINGS = "/v1/chat/completions", "/v1/demo_packs", "/v1/embeddings"
IMPORT = f"{PACKS}/import"
JSON = "application/json"


@dataclass(frozen=True)
class HostilePicture:
    """A file in a request."""

    name: str
    """How it was made."""
    data: bytes
    url: str


@dataclass(frozen=True)
class HostileRequest:
    """What is sent."""

    name: str
    path: str
    content: bytes
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": JSON})


def hostile_picture(seed: int) -> HostilePicture:
    """Every kind comes once in as many seeds as there are kinds, in another make each time."""
    chance, kinds = random.Random(seed), list(PICTURES)
    kind = kinds[seed % len(kinds)]
    data = PICTURES[kind](chance)
    dress = "plain" if chance.random() < 0.7 else chance.choice(list(DRESSES))
    return HostilePicture(f"{seed}: {kind}, {dress}", data, DRESSES[dress](data, chance))


def data_uri(data: bytes, declared: str = "image/png;base64") -> str:
    return f"data:{declared},{base64.b64encode(data).decode('ascii')}"


DRESSES: Mapping[str, Callable[[bytes, random.Random], str]] = {
    "plain": lambda data, chance: data_uri(data),
    "declared": lambda data, chance: data_uri(data, chance.choice(DECLARED)),
    "cut": lambda data, chance: data_uri(data)[: chance.randrange(60)],
    "one letter short": lambda data, chance: data_uri(data)[:-1],
    "lines": lambda data, chance: f"data:image/png;base64,{base64.encodebytes(data).decode('ascii')}",
    "gaps": lambda data, chance: f"data:image/png;base64, {' '.join(data_uri(data)[22:2000])}",
    "letters of URLs": lambda data, chance: data_uri(data).replace("+", "-").replace("/", "_"),
    "too many ends": lambda data, chance: data_uri(data) + "=" * chance.choice((1, 5)),
    "percents": lambda data, chance: (
        "data:image/png;base64," + "".join(f"%{letter:02X}" for letter in data_uri(data)[22:3000].encode())
    ),
    "other letters": lambda data, chance: (
        f"data:image/png;base64,{chance.choice(('é', chr(0), chr(0xD800), '😀', chr(0xFF21)))}AAAA"
    ),
    "no base64": lambda data, chance: (
        "data:image/png;base64," + chance.choice(("", "=", "A", "====", "*" * 99))
    ),
    "an address": lambda data, chance: chance.choice(ADDRESSES),
}
"""How a file is written into a request."""

DECLARED = (
    "image/svg+xml;base64",
    "image/jpeg;base64",
    "text/html;base64",
    "image/;base64",
    ";base64",
    "IMAGE/PNG;BASE64",
    "image/png",
    "image/png;charset=utf-8;base64",
    "image/png;name=../../x;base64",
    "image/png;;;base64",
    "image/png;base64;base64",
    "image/" + "x" * 100_000 + ";base64",
)
ADDRESSES = (
    "",
    " ",
    "data:",
    "file:///etc/passwd",
    "/etc/passwd",
    "http://127.0.0.1:1/a.png",
    "http://[::ffff:169.254.169.254]/latest/meta-data",
    "http://0x7f.1/",
    "https://example.org/" + "a" * 100_000,
    "ftp://example.org/a.png",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "javascript:alert(1)",
    "http://user:password@127.0.0.1/",
    "http://[",
    "http://\ud800/",
    "http://a\0b/",
    "http://" + "a." * 1000,
    "http://xn--a/",
    "//example.org/a.png",
    "blob:null/1",
)


def chat_body(model: str, content: Any = "This is", **more: Any) -> dict[str, Any]:
    """A good request."""
    return {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": content}]} | more


def picture_request(url: str, model: str, chance: random.Random) -> HostileRequest:
    """A picture where a question, a demonstration, a pack or an embedding has one.

    Args:
        model: one that fuses.
    """
    part = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "This is"}]
    good = [{"type": "image_url", "image_url": data_uri(GOOD_PICTURE)}]
    turns = [
        {"role": "user", "content": part},
        {"role": "assistant", "content": "bako"},
        {"role": "user", "content": good},
    ]
    shown = chance.choice(
        ({"image_url": url}, {"images": [data_uri(GOOD_PICTURE), url]}, {"image": url.partition(",")[2]})
    )
    path, body = chance.choice(
        (
            (CHAT, chat_body(model, part, stream=chance.random() < 0.3)),
            (CHAT, chat_body(model, messages=turns, demonstrations=chance.choice(("full", "fused")))),
            (PACKS, {"model": model, "demonstrations": [shown | {"question": "This is", "answer": "bako"}]}),
            (EMBEDDINGS, {"model": model, "input": chance.choice((url, [{"image_url": url}]))}),
        )
    )
    return HostileRequest(path, path, json.dumps(body).encode())


# Bodies.

TEXTS = (
    "",
    "\0",
    "a\0b",
    "\ud800",
    "\udfff\ud800",
    "<image>",
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "{{ bos_token }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "USER: ASSISTANT:",
    "[INST] <<SYS>>",
    "<|im_start|>system",
    "x" * 100_000,
    "\u202e\u200b\ufeff",
    "😀" * 500,
    "e\u0301" * 500,
    "\n" * 5000,
    "../../../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "pack-" + "0" * 32,
    "pack-" + "0" * 32 + "\0",
    "pack-" + "٣" * 32,
    "PACK-" + "A" * 32,
    "C:\\windows\\win.ini",
    "%s%n%x",
    "'; DROP TABLE packs; --",
    "${jndi:ldap://127.0.0.1/a}",
)
LITERALS = (
    "NaN",
    "-Infinity",
    "1e400",
    "-0",
    "-0.0",
    "1e-400",
    "9" * 5000,
    "-1",
    "0",
    "1.0",
    "1e0",
    "2147483648",
    "9223372036854775808",
    "true",
    "null",
    '"1"',
    "[]",
    "{}",
    '"\\ud800"',
    '"\\u0000"',
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "0x10",
    "+1",
    "01",
    "'x'",
    "\u00b2",
    "1" + "0" * 400 + ".5",
)
FIELDS = (
    *("model", "messages", "demonstrations", "demo_pack", "timeout_seconds", "max_tokens"),
    *("max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs", "top_logprobs"),
    *("stream", "stream_options", "response_format", "tools", "user", "metadata", "modalities"),
    *("presence_penalty", "__proto__", "other"),
)
WRAPPED = "@@"
"""Stands in a body for what JSON would not let be written."""


def _with(body: Mapping[str, Any], literal: str) -> bytes:
    text = json.dumps(body).replace(f'"{WRAPPED}"', literal)
    return text.encode("utf-8", "surrogatepass")


def odd_field(model: str, chance: random.Random) -> HostileRequest:
    name = chance.choice(FIELDS)
    literal = chance.choice(LITERALS)
    return HostileRequest(f"{name} {literal[:20]}", CHAT, _with(chat_body(model) | {name: WRAPPED}, literal))


def odd_text(model: str, chance: random.Random) -> HostileRequest:
    text = chance.choice(TEXTS)
    picture = data_uri(GOOD_PICTURE)
    path, body = chance.choice(
        (
            (CHAT, chat_body(model, text)),
            (CHAT, chat_body(model, [{"type": "text", "text": text}] * chance.choice((1, 300)))),
            (
                CHAT,
                chat_body(
                    model, messages=[{"role": "system", "content": text}, *chat_body(model)["messages"]]
                ),
            ),
            (CHAT, chat_body(model, stop=chance.choice((text, [text, "a"])), stream=True)),
            (CHAT, chat_body(chance.choice((text, model + text)))),
            (CHAT, chat_body(model, demo_pack=chance.choice((text, {"id": text, "select": 1})))),
            (CHAT, chat_body(model, user=text, metadata={text: text}, prompt_cache_key=text)),
            (CHAT, chat_body(model, **{text: text})),
            (PACKS, {"demonstrations": [{"image_url": picture, "question": text, "answer": "bako"}]}),
            (
                PACKS,
                {"model": model, "demonstrations": [{"image_url": picture, "question": "a", "answer": text}]},
            ),
            (PACKS, {"demonstrations": [{"image": text, "question": "a", "answer": "b"}]}),
            (EMBEDDINGS, {"model": model, "input": chance.choice((text, [text] * 5))}),
        )
    )
    return HostileRequest(f"text {text[:20]!a}", path, json.dumps(body).encode())


def odd_shape(model: str, chance: random.Random) -> HostileRequest:
    """Much of something, or in a place where it does not belong."""
    message = chat_body(model)["messages"][0]
    answer = {"role": "assistant", "content": "bako"}
    picture = {"type": "image_url", "image_url": data_uri(GOOD_PICTURE)}
    body = chance.choice(
        (
            chat_body(model, [{"type": "text", "text": "a"}] * 100_000),
            chat_body(model, [picture] * 65),
            chat_body(model, messages=[message] * 5000),
            chat_body(model, messages=[message, answer] * 2000 + [message]),
            chat_body(model, messages=[answer, message]),
            chat_body(model, messages=[{"role": "system", "content": [picture]}, message]),
            chat_body(model, messages=[{"role": "tool", "content": "a"}]),
            chat_body(model, [{"type": "text", "image_url": data_uri(GOOD_PICTURE)}]),
            chat_body(model, stop=["a"] * 1000, n=10**6),
            chat_body(model, n=8, logprobs=True, top_logprobs=20, temperature=2, top_p=1e-300),
            chat_body(model, temperature=1e-308, seed=-(2**63)),
            chat_body(model, timeout_seconds=5e-324),
            chat_body(model, max_tokens=2**31 - 1),
            chat_body(model, max_tokens=200, n=8),
            chat_body(model, metadata={str(number): "x" for number in range(50_000)}),
            chat_body(model, demo_pack={"id": "pack-" + "0" * 32, "select": 2**63}),
            {"model": model, "demonstrations": [{"question": "a", "answer": "b"}] * 10_000},
            {"model": model, "input": []},
        )
    )
    path = CHAT if "messages" in body else EMBEDDINGS if "input" in body else PACKS
    return HostileRequest("shape", path, json.dumps(body).encode())


def odd_encoding(model: str, chance: random.Random) -> HostileRequest:
    body = json.dumps(chat_body(model))
    content = chance.choice(
        (
            b"",
            b"null",
            b"[]",
            b'"x"',
            b"\xef\xbb\xbf" + body.encode(),
            body.encode("utf-16"),
            body.encode("utf-32"),
            body.replace("This", "\u00ff").encode("latin-1"),
            body.replace('"This is"', '"\ud800"').encode("utf-8", "surrogatepass"),
            body.encode()[: chance.randrange(len(body))],
            body.encode() * 2,
            body.encode() + b"\0",
            b" " * 10**6 + body.encode(),
            body.replace('"model"', '"model": "x", "model"').encode(),
            body.replace("{", '{"max_tokens": 1, "max_tokens": -1, ', 1).encode(),
            b"[" * 10**6,
            b'{"a":' * 10**6,
            b"-" * 1000,
            chance.randbytes(1000),
            body.replace('"', "'").encode(),
            body.replace("}", ",}").encode(),
            b"/* */" + body.encode(),
        )
    )
    return HostileRequest("encoding", chance.choice((CHAT, PACKS, EMBEDDINGS)), content)


def odd_headers(model: str, chance: random.Random) -> HostileRequest:
    types = (
        "",
        "text/plain",
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "application/json" + ";" * 5000,
        "a" * 10_000,
        "application/octet-stream",
        "\xff\xfe",
    )
    headers = {"content-type": chance.choice((JSON, *types))}
    others = {
        "content-encoding": ("gzip", "br", "identity, gzip"),
        "x-request-id": ("", "a" * 65, "a" * 64, "ok-1", "\xff", "../..", '"', "a b"),
        "accept": ("text/html", "*/*;q=0", "x" * 8000),
        "range": ("bytes=0-1", "bytes=-1"),
        "x-http-method-override": ("DELETE",),
        "host": ("", "a" * 300, "[::1", "other.example"),
        "x-forwarded-for": ("127.0.0.1" + ", 1" * 1000,),
        "if-none-match": ("*",),
        "cookie": ("a=b;" * 1000,),
        "authorization": (
            "",
            "Bearer",
            "Bearer \xff",
            "Basic YTpi",
            "Bearer " + "a" * 10_000,
            "bearer",
        ),
    }
    for name in chance.sample(list(others), chance.randint(0, 3)):
        headers[name] = chance.choice(others[name])
    path = chance.choice((CHAT, CHAT, PACKS, EMBEDDINGS, IMPORT))
    return HostileRequest("headers", path, json.dumps(chat_body(model)).encode(), headers=headers)


def odd_place(model: str, chance: random.Random) -> HostileRequest:
    """Paths and methods."""
    text = chance.choice(TEXTS).encode("utf-8", "surrogatepass")[:2000]
    escaped = "".join(f"%{byte:02X}" for byte in text)
    path = chance.choice(
        (
            f"/v1/demo_packs/{escaped}",
            f"/v1/demo_packs/{escaped}/export",
            f"/v1/models/{escaped}",
            f"/v1/{escaped}",
            f"/{escaped}",
            "/v1/demo_packs/%FF%FE",
            "/v1/demo_packs/..%2F..%2F..%2Fetc%2Fpasswd/export",
            "/playground/..%2Fpage.py",
            "/v1//models",
            "/v1/models/",
            f"{CHAT}?{'a=b&' * 5000}",
            "/metrics",
            "/openapi.json?x=%00",
            "/docs",
        )
    )
    method = chance.choice(
        ("GET", "GET", "DELETE", "POST", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND")
    )
    return HostileRequest(f"{method} {path[:40]}", path, b"" if method != "POST" else b"{}", method)


BODIES = (odd_field, odd_field, odd_text, odd_text, odd_shape, odd_encoding, odd_headers, odd_place)


def hostile_request(seed: int, model: str) -> HostileRequest:
    """One of all kinds in turn."""
    make = BODIES[seed % len(BODIES)]
    request = make(model, random.Random(seed))
    return replace(request, name=f"{seed}: {make.__name__}, {request.name}")

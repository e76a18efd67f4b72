"""Messages as turns: what belongs where, and what is refused."""

from __future__ import annotations

import asyncio

import pytest

from mmicl_core.config.serve import ServeConfig
from mmicl_core.prompts import Turn
from pipelines.serve.conversation import (
    as_demonstrations,
    count_fused,
    prefix_digest,
    read_conversation,
    read_demonstrations,
)
from pipelines.serve.errors import RequestError
from pipelines.serve.reading import Pictures
from pipelines.serve.schema import Message
from pipelines.serve.schema_packs import PackDemonstration
from tests.served import assistant, data_uri, png, user

LIMITS = ServeConfig(max_images=3, max_image_bytes=1024)
URL = "https://pictures.example/cat.png"


def read(*messages):
    return read_conversation([Message.model_validate(one) for one in messages], LIMITS)


class FakeMedia:
    """Has a picture at every address that it knows."""

    def __init__(self, known):
        self.known, self.asked = known, []

    async def load(self, url, where):
        self.asked.append((url, where))
        if url not in self.known:
            raise RequestError(f"{where}: nothing there", where)
        return self.known[url]


def pictures_of(conversation, media=None):
    return asyncio.run(conversation.pictures.load(media))


def test_turns_take_pictures_by_message_and_place_and_join_their_texts():
    between = [
        {"type": "image_url", "image_url": {"url": data_uri(png(1))}},
        {"type": "text", "text": "Are these"},
        {"type": "image_url", "image_url": {"url": data_uri(png(2))}},
        {"type": "text", "text": "alike?"},
    ]
    found = read(user("This is", png(0)), assistant("bako"), {"role": "user", "content": between})
    assert found.turns == (
        Turn(("0.1",), "This is", "bako"),
        Turn(("2.0", "2.2"), "Are these\nalike?", None),
    )
    assert pictures_of(found) == {"0.1": png(0), "2.0": png(1), "2.2": png(2)}
    assert found.system is None


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_at_the_head_become_the_system_text(role):
    head = {"role": role, "content": "Be brief."}
    parts = {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]}
    found = read(head, parts, user("a", png()))
    assert found.system == "Be brief.\nBe\nkind."
    assert found.turns == (Turn(("2.1",), "a", None),)


@pytest.mark.parametrize(
    ("messages", "param", "reason"),
    [
        ([user("a"), assistant("b"), {"role": "system", "content": "c"}], "messages.2.role", "at the head"),
        ([{"role": "system", "content": "c"}], "messages", "end with a user message"),
        ([user("a"), assistant("b")], "messages", "end with a user message"),
        ([assistant("b")], "messages.0.role", "'user' belongs"),
        ([user("a"), user("b")], "messages.1.role", "'assistant' belongs"),
        (
            [user("a", png()) | {"role": "system"}, user("b")],
            "messages.0.content.1.image_url.url",
            "a system message",
        ),
        (
            [user("a"), user("", png()) | {"role": "assistant"}, user("b")],
            "messages.1.content.1.image_url.url",
            "an assistant message",
        ),
        ([user("")], "messages.0.content", "says nothing"),
        ([user("a", *[png()] * 4)], "messages.0.content.4.image_url.url", "picture 4 of the request, 3 are"),
        (
            [*[user("a", png()), assistant("b")] * 3, user("c", URL)],
            "messages.6.content.1.image_url.url",
            "picture 4",
        ),
    ],
)
def test_conversation_that_is_none_is_refused_with_its_place(messages, param, reason):
    with pytest.raises(RequestError, match=reason) as refused:
        read(*messages)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("cat.png", "neither a picture nor"),
        ("file:///etc/passwd", "neither a picture nor"),
        ("/etc/passwd", "neither a picture nor"),
        ("ftp://pictures.example/cat.png", "neither a picture nor"),
        ("data:text/html;base64,PGI+", "neither a picture nor"),
        ("data:image/png,raw", "neither a picture nor"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "an SVG"),
        ("data:IMAGE/SVG+XML;base64,PHN2Zy8+", "an SVG"),
        (data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "does not begin as"),
        (data_uri(b"%PDF-1.7"), "does not begin as"),
        (data_uri(b""), "does not begin as"),
        ("data:image/png;base64,not base64!", "is not base64"),
        ("data:image/png;base64,abc", "is not base64"),
        (data_uri(png())[:-4] + "\n" + data_uri(png())[-4:], "is not base64"),
        (data_uri(png()).replace("/9", "_9") + "-", "is not base64"),
        ("data:image/png;base64," + "é" * 8, "is not base64"),
        ("data:image/png;base64," + "A" * 1400, "1050 bytes, 1024 are allowed"),
        ("data:image/png;base64," + "A" * 100_000, "75000 bytes, 1024 are allowed"),
    ],
)
def test_picture_that_is_none_is_refused_with_its_place(url, reason):
    with pytest.raises(RequestError, match=reason) as refused:
        read(user("a", url))
    assert refused.value.param == "messages.0.content.1.image_url.url"


@pytest.mark.parametrize(
    ("size", "fits"), [(1022, True), (1023, True), (1024, True), (1025, False), (1027, False)]
)
def test_picture_is_taken_up_to_the_size_limit_and_not_a_byte_over(size, fits):
    url = data_uri(png().ljust(size, b"x"), "image/PNG").replace("data:", "DATA:")
    if fits:
        assert len(pictures_of(read(user("a", url)))["0.1"]) == size
        return
    with pytest.raises(RequestError, match=f"{size} bytes, 1024 are allowed"):
        read(user("a", url))


@pytest.mark.parametrize("beginning", [b"\xff\xd8\xff\xe0", b"GIF89a", b"GIF87a", b"BM", b"RIFF\0\0\0\0WEBP"])
def test_picture_of_each_kind_that_is_opened_later_passes(beginning):
    assert pictures_of(read(user("a", beginning)))["0.1"] == beginning


def test_addresses_are_loaded_once_each_and_take_their_places_among_the_others():
    media = FakeMedia({URL: png(7), URL + "?b": png(8)})
    found = read(user("a", URL, png(1)), assistant("b"), user("c", URL))
    assert pictures_of(found, media) == {"0.1": png(7), "0.2": png(1), "2.1": png(7)}
    assert [url for url, _ in media.asked] == [URL]


def test_address_that_cannot_be_loaded_is_refused_with_its_place():
    with pytest.raises(RequestError) as refused:
        pictures_of(read(user("a", URL)), FakeMedia({}))
    assert refused.value.param == "messages.0.content.1.image_url.url"


def test_loads_that_go_on_end_with_the_first_that_fails():
    ended = []

    class Slow(FakeMedia):
        async def load(self, url, where):
            if url == URL:
                await asyncio.sleep(0)
                raise RequestError("nothing there", where)
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(url)

    pictures = Pictures(LIMITS)
    pictures.add("a", URL + "?slow", "there")
    pictures.add("b", URL, "here")
    with pytest.raises(RequestError, match="nothing there"):
        asyncio.run(pictures.load(Slow({})))
    assert ended == [URL + "?slow"]


@pytest.mark.parametrize(
    ("fields", "images"),
    [
        ({"image_url": data_uri(png(1))}, (png(1),)),
        ({"image_url": {"url": data_uri(png(1))}}, (png(1),)),
        ({"image": data_uri(png(1)).partition(",")[2]}, (png(1),)),
        ({"images": [data_uri(png(1)), {"url": data_uri(png(2))}]}, (png(1), png(2))),
    ],
)
def test_demonstration_of_a_pack_takes_pictures_in_each_form(fields, images):
    sent = [PackDemonstration.model_validate(fields | {"question": "This is", "answer": "bako"})] * 1
    turns, pictures = read_demonstrations(sent, LIMITS)
    (found,) = as_demonstrations(turns, asyncio.run(pictures.load(None)))
    assert (found.images, found.question, found.answer) == (images, "This is", "bako")


SHOWN, BLIND, LAST = Turn(("a",), "q", "r"), Turn((), "q", "r"), Turn(("b",), "q", None)


@pytest.mark.parametrize(
    ("turns", "mode", "fuses", "count"),
    [
        ([SHOWN, SHOWN, LAST], "auto", True, 2),
        ([SHOWN, BLIND, SHOWN, LAST], "auto", True, 1),
        ([BLIND, SHOWN, LAST], "auto", True, 0),
        ([SHOWN, SHOWN, LAST], "auto", False, 0),
        ([SHOWN, BLIND, SHOWN, LAST], "fused", True, 3),
        ([SHOWN, SHOWN, LAST], "full", True, 0),
        ([LAST], "auto", True, 0),
        ([LAST], "fused", True, 0),
    ],
)
def test_demonstrations_that_are_fused_are_the_first_ones_with_pictures_or_all(turns, mode, fuses, count):
    assert count_fused(turns, mode, fuses) == count


def test_prefix_is_named_by_tenant_instructions_turns_and_the_bytes_of_their_pictures():
    turns, pictures = [Turn(("a",), "q", "r"), Turn(("b",), "s", "t")], {"a": png(1), "b": png(2)}
    same = prefix_digest(
        "me", None, [Turn(("x",), "q", "r"), Turn(("y",), "s", "t")], {"x": png(1), "y": png(2)}
    )
    name = prefix_digest("me", None, turns, pictures)
    assert name == same
    others = [
        prefix_digest("you", None, turns, pictures),
        prefix_digest("me", "", turns, pictures),
        prefix_digest("me", "system", turns, pictures),
        prefix_digest("me", None, turns[:1], pictures),
        prefix_digest("me", None, turns[::-1], pictures),
        prefix_digest("me", None, turns, {"a": png(2), "b": png(1)}),
        prefix_digest("me", None, [Turn(("a",), "qr", ""), turns[1]], pictures),
        prefix_digest("me", None, [Turn(("a", "b"), "q", "r"), Turn((), "s", "t")], pictures),
        prefix_digest("me", None, [], {}),
    ]
    assert len({name, *others}) == 1 + len(others)


def test_text_is_taken_up_to_the_limit_of_all_texts_together_and_not_a_letter_over():
    limits = ServeConfig(max_text_characters=10)

    def told(answer):
        return [Message.model_validate(one) for one in (user("abc"), assistant(answer), user("def"))]

    assert read_conversation(told("1234"), limits).turns[0].answer == "1234"
    with pytest.raises(RequestError, match="messages hold 11 characters of text, 10 are allowed") as error:
        read_conversation(told("12345"), limits)
    assert error.value.param == "messages"
    shown = [PackDemonstration(image_url=data_uri(png()), question="abcdef", answer="12345")]
    with pytest.raises(RequestError, match="demonstrations hold 11 characters"):
        read_demonstrations(shown, limits)

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.errors import DataError
from mmicl_core.evaluation.answering import (
    LocalAnswerer,
    Reply,
    Request,
    key_of,
    picture_of,
    request_of,
)
from mmicl_core.evaluation.controls import BLANK, Shown
from mmicl_core.evaluation.tasks.base import Item, Metric, Prediction, Questions, Style, Task, mean_of
from mmicl_core.methods.base import Method, Plain
from mmicl_core.prompts import Turn
from tests.fakes import draw_picture, encode_picture, tiny_backbone
from tests.families import write_model
from tests.methods import make_method

TOLERANCE = 1e-4
CHOICES = ("bako", "mute red", "blue")


@dataclass(frozen=True)
class Encoded:
    """Pictures in memory."""

    pictures: Mapping[str, bytes]

    def read(self, key: str) -> bytes:
        if key not in self.pictures:
            raise DataError(f"there is no picture {key!r}")
        return self.pictures[key]

    def digest(self, key: str) -> str:
        return hashlib.sha256(self.read(key)).hexdigest()


SIZES = {"a": (72, 40), "b": (30, 90), "c": (72, 72), "d": (64, 64)}
PICTURES = Encoded(
    {
        key: encode_picture(draw_picture(number).resize(size))
        for number, (key, size) in enumerate(SIZES.items())
    }
)
REQUESTS = (
    Request(
        (Turn(("a",), "This is", "bako"), Turn(("b",), "This is", "mute"), Turn(("c",), "This is", None)),
        6,
        CHOICES,
    ),
    Request((Turn(("d", "a"), "red or blue", None),), 3, ("red", "blue cup")),
    Request((Turn((), "This is", "bako"), Turn(("b",), "This is", "mute"), Turn((), "Name it", None)), 1),
)


class Opened(Task):
    """Asks in the words of a style behind an opening, and wants to know how likely answers are."""

    name = "opened"
    source = "this test"
    metrics = (Metric("accuracy", mean_of("right")),)
    max_new_tokens = 7

    def load(self) -> Questions:
        raise AssertionError("a request is made of what was read")

    def opening(self, style: Style, shots: int) -> str:
        return f"Opening for {style} of {shots}. "

    def words(self, item: Item, style: Style) -> str:
        return f"{style}: {item.question}"

    def choices(self, item: Item) -> tuple[str, ...]:
        return (item.answer, "something else")


@pytest.fixture(scope="module")
def backbone() -> HuggingFaceBackbone:
    return tiny_backbone().eval()


@pytest.fixture(scope="module", params=["plain", "aim"])
def method(request: pytest.FixtureRequest, backbone: HuggingFaceBackbone) -> Method:
    return Plain(backbone) if request.param == "plain" else make_method("aim", backbone)


def _answer(
    method: Method, requests: Sequence[Request], pictures: Encoded = PICTURES, raw: int = 0
) -> list[Reply]:
    return LocalAnswerer(method, raw).answer(requests, pictures)


def _same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one == pytest.approx(other, abs=TOLERANCE)


@pytest.mark.parametrize("style", ["chat", "open_flamingo"])
def test_request_is_a_query_behind_its_demonstrations_in_the_words_of_a_style(style: Style) -> None:
    items = [Item(f"{place}", (f"{place}",), f"{place}?", f"answer {place}") for place in range(3)]
    request = request_of(Opened(), Shown(items[2], tuple(items[:2])), style)
    assert [turn.question for turn in request.turns] == [
        f"Opening for {style} of 2. {style}: 0?",
        f"{style}: 1?",
        f"{style}: 2?",
    ]
    assert [turn.answer for turn in request.turns] == ["answer 0", "answer 1", None]
    assert [turn.pictures for turn in request.turns] == [("0",), ("1",), ("2",)]
    assert not any(turn.scored for turn in request.turns)
    assert (request.max_new_tokens, request.choices) == (7, ("answer 2", "something else"))
    alone = request_of(Opened(), Shown(items[2], ()), style)
    assert alone.turns == (Turn(("2",), f"Opening for {style} of 0. {style}: 2?", None),)


@pytest.mark.parametrize("request_", [*REQUESTS, Request((Turn((), 'ein "Kätzchen"\n猫?', None),), 4)])
def test_request_is_the_same_after_it_was_a_line_of_json(request_: Request) -> None:
    line = request_.to_json()
    assert Request.from_json(line) == request_
    assert "\n" not in line
    assert Request.from_json(line).to_json() == line


def test_reply_is_scored_by_its_text_and_log_probabilities() -> None:
    reply = Reply("bako", 12, {"bako": -0.5})
    assert reply.prediction == Prediction("bako", {"bako": -0.5})


def _key(request: Request, identity: str = "model", pictures: Encoded = PICTURES) -> str:
    return key_of(request, identity, pictures.digest)


def _with(place: int, **changes: Any) -> Request:
    turns = list(REQUESTS[0].turns)
    turns[place] = replace(turns[place], **changes)
    return replace(REQUESTS[0], turns=tuple(turns))


def test_key_changes_with_everything_that_an_answer_depends_on() -> None:
    request = REQUESTS[0]
    variants = [
        request,
        _with(0, question="That is"),
        _with(0, answer="mute"),
        _with(2, question="This is "),
        _with(2, pictures=("d",)),
        _with(2, pictures=("c", "c")),
        _with(2, pictures=()),
        _with(0, pictures=(f"{BLANK}a",)),
        _with(2, pictures=(f"{BLANK}c",)),
        replace(request, turns=request.turns[1:]),
        replace(request, turns=(request.turns[1], request.turns[0], request.turns[2])),
        replace(request, max_new_tokens=7),
        replace(request, beams=3),
        replace(request, choices=CHOICES[:2]),
        replace(request, choices=()),
    ]
    keys = [_key(variant) for variant in variants] + [_key(request, "another model")]
    assert len(set(keys)) == len(keys)
    assert _key(Request.from_json(request.to_json())) == keys[0]


def test_key_is_of_the_bytes_of_pictures_and_not_of_their_names() -> None:
    renamed = Encoded({f"moved/{key}": data for key, data in PICTURES.pictures.items()})
    turns = (
        replace(turn, pictures=tuple(f"moved/{key}" for key in turn.pictures)) for turn in REQUESTS[0].turns
    )
    assert _key(replace(REQUESTS[0], turns=tuple(turns)), pictures=renamed) == _key(REQUESTS[0])
    for other_bytes in (encode_picture(draw_picture(9)), PICTURES.pictures["a"] + b"\0"):
        changed = Encoded({**PICTURES.pictures, "a": other_bytes})
        assert _key(REQUESTS[0], pictures=changed) != _key(REQUESTS[0])
    # Turns of a picture do not run into each other.
    assert _key(_with(2, pictures=("c", "d"))) != _key(_with(1, pictures=("b", "c", "d")))


def test_blank_picture_is_grey_and_as_large_as_the_one_it_stands_for() -> None:
    for key, size in SIZES.items():
        assert picture_of(key, PICTURES).size == size
        blank = picture_of(BLANK + key, PICTURES)
        assert (blank.size, blank.mode) == (size, "RGB")
        assert blank.getcolors() == [(size[0] * size[1], (128, 128, 128))]
        assert picture_of(key, PICTURES).getcolors() != blank.getcolors()


@pytest.mark.parametrize("key", ["missing", f"{BLANK}missing", "broken", f"{BLANK}broken"])
def test_picture_that_cannot_be_read_is_told(method: Method, key: str) -> None:
    pictures = Encoded({"broken": b"no picture"})
    with pytest.raises(DataError):
        _answer(method, [Request((Turn((key,), "This is", None),), 2)], pictures)


def test_batch_answers_as_one_at_a_time(method: Method) -> None:
    together = _answer(method, REQUESTS)
    for request, reply in zip(REQUESTS, together, strict=True):
        (alone,) = _answer(method, [request])
        assert reply.text == alone.text
        assert reply.prompt_tokens == alone.prompt_tokens
        assert tuple(reply.log_probabilities) == tuple(alone.log_probabilities) == request.choices
        assert _same(reply.log_probabilities, alone.log_probabilities)
    assert any(reply.text for reply in together)
    backwards = _answer(method, REQUESTS[::-1])
    assert [reply.text for reply in backwards[::-1]] == [reply.text for reply in together]


def test_answer_is_cut_where_its_request_says(backbone: HuggingFaceBackbone) -> None:
    long, short = (replace(REQUESTS[0], max_new_tokens=count) for count in (8, 2))
    whole, cut = _answer(Plain(backbone), [long, short])
    ids = [backbone.tokenizer(reply.text, add_special_tokens=False)["input_ids"] for reply in (whole, cut)]
    assert whole.text.startswith(cut.text)
    assert 0 < len(ids[1]) < len(ids[0])


def test_answers_are_searched_for_by_as_many_beams_as_are_asked_for(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = list[int]()
    search = Method.generate

    def generate(self: Method, prompts: Any, most: int, beams: int = 1) -> list[list[int]]:
        used.append(beams)
        return search(self, prompts, most, beams)

    monkeypatch.setattr(Method, "generate", generate)
    greedy, searched = (
        LocalAnswerer(method).answer([replace(one, beams=count) for one in REQUESTS], PICTURES)
        for count in (1, 4)
    )
    assert used == [1, 4]
    assert [one.text for one in greedy] != [one.text for one in searched]


def test_prompt_tokens_are_the_positions_of_a_written_out_prompt(backbone: HuggingFaceBackbone) -> None:
    for request, reply in zip(REQUESTS, _answer(Plain(backbone), REQUESTS), strict=True):
        assert reply.prompt_tokens == len(_ids(backbone, request.turns))


def _ids(backbone: HuggingFaceBackbone, turns: Sequence[Turn]) -> list[int]:
    """Token ids of a prompt as the model's own processor writes them."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content = [*({"type": "image"} for _ in turn.pictures), {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    processor = backbone.processor
    text = processor.apply_chat_template(messages, add_generation_prompt=turns[-1].answer is None)
    images = [picture_of(key, PICTURES) for turn in turns for key in turn.pictures]
    return list(processor(images=images or None, text=text, add_special_tokens=False)["input_ids"][0])


@torch.no_grad()
def _log_probability(backbone: HuggingFaceBackbone, turns: Sequence[Turn], choice: str) -> float:
    """That of an answer with all that ends it, by the library's own model and processor."""
    answered = (*turns[:-1], replace(turns[-1], answer=choice))
    images = [picture_of(key, PICTURES) for turn in turns for key in turn.pictures]
    ids, start = torch.tensor(_ids(backbone, answered)), len(_ids(backbone, turns))
    pixels = backbone.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    logits = backbone.model(input_ids=ids[None], pixel_values=pixels).logits[0].log_softmax(-1)
    return float(logits[start - 1 : -1].gather(1, ids[start:, None]).sum())


def test_log_probabilities_of_choices_are_those_of_the_whole_answers(backbone: HuggingFaceBackbone) -> None:
    for request, reply in zip(REQUESTS[:2], _answer(Plain(backbone), REQUESTS[:2]), strict=True):
        direct = {choice: _log_probability(backbone, request.turns, choice) for choice in request.choices}
        assert _same(reply.log_probabilities, direct)
        assert all(value < 0 for value in direct.values())


def _blank(request: Request) -> Request:
    turns = (replace(turn, pictures=tuple(BLANK + key for key in turn.pictures)) for turn in request.turns)
    return replace(request, turns=tuple(turns))


def test_blank_pictures_are_seen_as_grey_ones_of_the_same_size(method: Method) -> None:
    grey = Encoded({key: encode_picture(Image.new("RGB", size, "grey")) for key, size in SIZES.items()})
    (blank,) = _answer(method, [_blank(REQUESTS[0])])
    (expected,) = _answer(method, [REQUESTS[0]], grey)
    (seen,) = _answer(method, [REQUESTS[0]])
    assert (blank.text, blank.prompt_tokens) == (expected.text, expected.prompt_tokens)
    assert _same(blank.log_probabilities, expected.log_probabilities)
    assert not _same(blank.log_probabilities, seen.log_probabilities)


def test_raw_writes_the_last_demonstrations_out_behind_fused_ones(backbone: HuggingFaceBackbone) -> None:
    aim, request = make_method("aim", backbone), REQUESTS[0]
    replies = [_answer(aim, [request], raw=raw)[0] for raw in range(4)]
    (plain,) = _answer(Plain(backbone), [request])
    # A demonstration that is fused has the positions of its text alone.
    visual = len(backbone.prepare([draw_picture(0)])[0].ids)
    counts = [reply.prompt_tokens for reply in replies]
    assert plain.prompt_tokens is not None
    assert counts == [plain.prompt_tokens - visual * fused for fused in (2, 1, 0, 0)]
    assert _same(replies[2].log_probabilities, plain.log_probabilities)
    assert replies[2].text == plain.text
    assert not _same(replies[1].log_probabilities, replies[0].log_probabilities)
    assert not _same(replies[1].log_probabilities, plain.log_probabilities)


@pytest.mark.parametrize("tokens", [1, 6])
def test_cost_of_one_question_is_its_time_and_its_memory(method: Method, tokens: int) -> None:
    request = replace(REQUESTS[0], max_new_tokens=tokens)
    cost = LocalAnswerer(method).time(request, PICTURES)
    (reply,) = _answer(method, [request])
    assert cost.ttft_ms > 0
    assert cost.prompt_tokens == reply.prompt_tokens
    assert cost.prompt_tokens is not None
    # Keys and values of 2 layers with 2 heads of 16 numbers, in 32 bits.
    assert cost.kv_bytes == 2 * 2 * 2 * 16 * 4 * cost.prompt_tokens
    if tokens == 1:
        assert cost.tokens_per_second is None
    else:
        assert cost.tokens_per_second is not None
        assert cost.tokens_per_second > 0


@pytest.mark.parametrize(("family", "is_known"), [("qwen2_vl", True), ("blip_2_t5", False)])
def test_memory_is_that_of_the_language_models_own_cache(tmp_path: Path, family: str, is_known: bool) -> None:
    write_model(family, tmp_path)
    backbone = load_backbone(tmp_path).eval()
    method = Plain(backbone)
    turns = (Turn(("c",), "what is it", None),)
    cost = LocalAnswerer(method).time(Request(turns, 2), PICTURES)
    if not is_known:
        assert cost.kv_bytes is None
        return
    prepared = dict(zip("c", backbone.prepare([picture_of("c", PICTURES)]), strict=True))
    with torch.no_grad():
        prompts = method.embed(method.arrange([turns], prepared, "left"))
        cache = backbone.read(prompts, use_cache=True).past_key_values
    assert cost.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

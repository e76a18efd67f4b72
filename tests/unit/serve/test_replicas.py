"""Compressor and generator as plain objects: what Ray Serve adds is tested in `integration`."""

from __future__ import annotations

import asyncio
import time
from itertools import groupby

import numpy as np
import pytest
import torch

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.bank import Demonstration, UnknownPackError
from mmicl_core.errors import CheckpointError, DataError
from mmicl_core.methods.aim import Aggregator, read_demonstrations
from mmicl_core.prompts import ChatFormat, Turn
from pipelines.serve import generator as generator_module
from pipelines.serve.compressor import DEMONSTRATIONS_AT_ONCE, Compressor
from pipelines.serve.contracts import Answer, Question
from pipelines.serve.generator import Generator
from tests.fakes import draw_picture, encode_picture, tiny_backbone

MAX_PIXELS = 10_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_backbone().save(folder / "backbone")
    backbone = load_backbone(folder / "backbone")
    torch.manual_seed(0)
    aggregator = Aggregator(backbone.width)
    torch.nn.init.normal_(aggregator.projection.weight)
    aggregator.save(folder / "aggregator", backbone.identity)
    return folder


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model / "backbone", MAX_PIXELS)


@pytest.fixture
def compressor(model, tmp_path):
    return Compressor(model / "backbone", model / "aggregator", tmp_path / "bank", MAX_PIXELS)


def demonstrations(count: int) -> list[Demonstration]:
    return [
        Demonstration(encode_picture(draw_picture(seed)), "This is", "bako" * (1 + seed % 3))
        for seed in range(count)
    ]


def question(text: str = "This is", max_new_tokens: int = 6, **more) -> Question:
    turns = (*more.pop("before", ()), Turn("query", text, None))
    pictures = {"query": encode_picture(draw_picture(99))} | more.pop("pictures", {})
    return Question(turns, pictures, max_new_tokens, **more)


def written_out(shown: list[Demonstration]) -> dict:
    turns = [Turn(str(number), one.question, one.answer) for number, one in enumerate(shown)]
    return {"before": turns, "pictures": {str(number): one.image for number, one in enumerate(shown)}}


async def everything(parts) -> list:
    return [part async for part in parts]


def test_pack_holds_what_the_aggregator_makes_of_each_demonstration_alone(model, compressor):
    shown = demonstrations(DEMONSTRATIONS_AT_ONCE + 2)
    entry = asyncio.run(compressor.register(shown))
    pack = asyncio.run(compressor.load(entry.id))
    backbone = load_backbone(model / "backbone")
    aggregator = Aggregator.load(model / "aggregator", backbone)
    for number, (one, fused) in enumerate(zip(shown, pack.fused, strict=True)):
        vision_NVW = backbone.encode_pixels(backbone.pixels([draw_picture(number)]))
        turn = Turn("", one.question, one.answer)
        (state_TD,) = read_demonstrations(backbone, ChatFormat(backbone.processor), [turn], vision_NVW)
        # Sums in another order, in a batch of another shape, differ in the last bits of float32.
        np.testing.assert_allclose(fused, aggregator(state_TD).numpy(), rtol=1e-4, atol=1e-4)
        assert entry.tokens_fused[number] == len(fused)
        assert entry.tokens_full[number] == len(fused) + backbone.visual_tokens


def test_known_demonstrations_are_not_read_again(compressor, monkeypatch):
    entry = asyncio.run(compressor.register(demonstrations(2)))

    def refuse(pixels):
        raise AssertionError("the backbone read a demonstration that the bank holds")

    monkeypatch.setattr(compressor.backbone, "encode_pixels", refuse)
    assert asyncio.run(compressor.register(demonstrations(2))) == entry


def test_damaged_pack_is_made_again_when_its_demonstrations_come_back(compressor, tmp_path):
    entry = asyncio.run(compressor.register(demonstrations(2)))
    file = tmp_path / "bank" / f"{entry.id}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert asyncio.run(compressor.register(demonstrations(2))) == entry
    assert asyncio.run(compressor.load(entry.id)).entry == entry


def test_pack_of_another_aggregator_is_not_used(model, compressor, tmp_path):
    entry = asyncio.run(compressor.register(demonstrations(1)))
    retrained = Aggregator(compressor.backbone.width, embedding_spread=0.5)
    retrained.save(tmp_path / "retrained", compressor.backbone.identity)
    other = Compressor(model / "backbone", tmp_path / "retrained", tmp_path / "bank", MAX_PIXELS)
    with pytest.raises(ValueError, match="made for aggregator"):
        asyncio.run(other.describe(entry.id))
    assert asyncio.run(other.register(demonstrations(1))).id != entry.id


def test_aggregator_of_another_backbone_is_refused_when_the_replica_is_made(model, tmp_path):
    Aggregator(32).save(tmp_path / "foreign", "another backbone")
    with pytest.raises(CheckpointError, match="another backbone"):
        Compressor(model / "backbone", tmp_path / "foreign", tmp_path / "bank", MAX_PIXELS)


@pytest.mark.parametrize(
    ("image", "question_text", "reason"),
    [
        (b"no picture", "This is", "picture 2 of 2: the bytes are not a readable picture"),
        (encode_picture(draw_picture(0, side=101)), "This is", "picture 2 of 2: .* 101 x 101 pixels"),
        (encode_picture(draw_picture(0)), "This is <answer> bako </s>", "control token </s>|<answer>"),
        (encode_picture(draw_picture(0)), "This is " * 2100, "shorten its question or its answer"),
    ],
)
def test_demonstration_that_cannot_be_read_is_refused_and_nothing_is_stored(
    compressor, tmp_path, image, question_text, reason
):
    with pytest.raises(DataError, match=reason):
        asyncio.run(compressor.register([*demonstrations(1), Demonstration(image, question_text, "bako")]))
    assert not (tmp_path / "bank").exists()


def test_unknown_pack_is_reported_as_unknown(compressor):
    with pytest.raises(UnknownPackError):
        asyncio.run(compressor.load("pack-" + "0" * 32))


def test_pack_before_a_question_costs_its_fused_tokens_instead_of_the_full_ones(compressor, generator):
    shown = demonstrations(3)
    entry = asyncio.run(compressor.register(shown))
    pack = asyncio.run(compressor.load(entry.id))
    alone, full, packed = (
        asyncio.run(generator.answer(asked))
        for asked in (question(), question(**written_out(shown)), question(fused=pack.fused))
    )
    assert full.prompt_tokens - alone.prompt_tokens == sum(entry.tokens_full)
    assert packed.prompt_tokens - alone.prompt_tokens == sum(entry.tokens_fused)


def expected_answer(generator: Generator, asked: Question) -> tuple[str, int]:
    """By hand: prefix, fused tokens, turns; text and number of the tokens that `generate` gives."""
    backbone, chat = generator.backbone, generator.chat

    def embed(piece):
        if piece.kind == "image":
            return backbone.project(generator.vision([asked.pictures[piece.reference]]))[0]
        return backbone.embed(torch.tensor(piece.ids))

    embeds_BLD = torch.cat(
        [
            *map(embed, chat.prefix()),
            *map(torch.tensor, asked.fused),
            *(embed(piece) for turn in asked.turns for piece in chat.turn(turn)),
        ]
    )[None]
    mask_BL = torch.ones(embeds_BLD.shape[:2], dtype=torch.long)
    (ids,) = backbone.generate(embeds_BLD, mask_BL, asked.max_new_tokens)
    return chat.decode(ids), len(ids)


def test_answer_is_that_of_the_backbone_behind_fused_and_full_demonstrations(compressor, generator):
    pack = asyncio.run(compressor.load(asyncio.run(compressor.register(demonstrations(4))).id))
    asked = (
        question(),
        question(**written_out(demonstrations(2))),
        question(fused=pack.fused),
        question(fused=pack.fused[:1], **written_out(demonstrations(1))),
    )
    answers = [asyncio.run(generator.answer(one)) for one in asked]
    for one, answer in zip(asked, answers, strict=True):
        assert (answer.text, answer.completion_tokens) == expected_answer(generator, one)
    assert len({answer.text for answer in answers}) > 1


def test_time_to_first_token_ends_with_the_first_token(generator, monkeypatch):
    def slow_tokens(*arguments):
        for token in (300, 301, 302):
            time.sleep(0.05)
            yield token

    monkeypatch.setattr(generator_module, "greedy_tokens", slow_tokens)
    start = time.perf_counter()
    answer = asyncio.run(generator.answer(question()))
    whole_ms = (time.perf_counter() - start) * 1000
    # Two more tokens of 50 ms come after the first.
    assert 50 <= answer.ttft_ms <= whole_ms - 100


def test_streamed_pieces_make_up_the_answer_that_comes_last(generator):
    *pieces, answer = asyncio.run(everything(generator.stream(question(max_new_tokens=8))))
    assert isinstance(answer, Answer)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1


def test_streamed_characters_are_whole_although_tokens_are_bytes(generator, monkeypatch):
    text = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}"
    ids = generator.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(generator_module, "greedy_tokens", lambda *arguments: iter(ids))
    *pieces, answer = asyncio.run(everything(generator.stream(question(max_new_tokens=len(ids) + 1))))
    assert len(ids) > len(text) - 4
    assert "".join(pieces) == answer.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert answer.finish_reason == "stop"


def test_questions_at_the_same_time_take_turns(generator):
    order = []

    async def follow(name):
        async for _ in generator.stream(question(max_new_tokens=8)):
            order.append(name)

    async def both():
        await asyncio.gather(follow("first"), follow("second"))

    asyncio.run(both())
    assert len(list(groupby(order))) > 4


def test_answer_that_is_cut_says_so(generator):
    answer = asyncio.run(generator.answer(question(max_new_tokens=2)))
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 2)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (question(max_new_tokens=2048), "the model reads 2048: register the demonstrations as a demo_pack"),
        (question(text="This is <image>"), "control token <image>"),
        (question(pictures={"query": b"GIF89a"}), "picture 1 of 1: the bytes are not a readable picture"),
        (question(pictures={"query": encode_picture(draw_picture(0, side=101))}), "101 x 101 pixels"),
    ],
)
def test_question_that_cannot_be_answered_is_refused_before_the_first_piece(generator, asked, reason):
    async def first():
        return await anext(generator.stream(asked))

    with pytest.raises(DataError, match=reason):
        asyncio.run(first())

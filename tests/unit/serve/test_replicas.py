"""Compressor and generator as plain objects: what Ray Serve adds is tested in `integration`."""

from __future__ import annotations

import asyncio
import time
from itertools import groupby

import numpy as np
import pytest
import torch

from mmicl_core.backbones.decoding import generate
from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.backbones.vision import join
from mmicl_core.bank import Demonstration, UnknownPackError
from mmicl_core.config.model import AimConfig, PromptTuningConfig
from mmicl_core.errors import CheckpointError, DataError
from mmicl_core.methods import load_method
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.prompt_tuning import PromptTuning
from mmicl_core.prompts import Turn
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
    torch.manual_seed(0)
    method = Aim(load_backbone(folder / "backbone"), AimConfig())
    torch.nn.init.normal_(method.aggregator.projection.weight)
    method.save(folder / "adapter", {})
    return folder


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model / "backbone", MAX_PIXELS)


@pytest.fixture
def compressor(model, tmp_path):
    return Compressor(model / "backbone", model / "adapter", tmp_path / "bank", MAX_PIXELS)


def demonstrations(count: int) -> list[Demonstration]:
    return [
        Demonstration((encode_picture(draw_picture(seed)),), "This is", "bako" * (1 + seed % 3))
        for seed in range(count)
    ]


def question(text: str = "This is", max_new_tokens: int = 6, **more) -> Question:
    turns = (*more.pop("before", ()), Turn(more.pop("about", ("query",)), text, None))
    pictures = {"query": encode_picture(draw_picture(99))} | more.pop("pictures", {})
    return Question(turns, pictures, max_new_tokens, **more)


def written_out(shown: list[Demonstration]) -> dict:
    turns, pictures = [], {}
    for number, one in enumerate(shown):
        keys = tuple(f"{number}.{place}" for place in range(len(one.images)))
        pictures |= zip(keys, one.images, strict=True)
        turns.append(Turn(keys, one.question, one.answer))
    return {"before": turns, "pictures": pictures}


async def everything(parts) -> list:
    return [part async for part in parts]


def test_pack_holds_what_the_aggregator_makes_of_each_demonstration_alone(model, compressor):
    shown = demonstrations(DEMONSTRATIONS_AT_ONCE + 2)
    entry = asyncio.run(compressor.register(shown))
    pack = asyncio.run(compressor.load(entry.id))
    backbone = load_backbone(model / "backbone")
    method = load_method(model / "adapter", backbone)
    for number, (one, fused) in enumerate(zip(shown, pack.fused, strict=True)):
        (prepared,) = backbone.prepare([draw_picture(number)])
        turn = Turn(("p",), one.question, one.answer)
        (state_TD,) = method.reader.read(method.reader.pack([turn], {"p": prepared}))
        # Sums in another order, in a batch of another shape, differ in the last bits of float32.
        np.testing.assert_allclose(fused, method.aggregator(state_TD).numpy(), rtol=1e-4, atol=1e-4)
        assert entry.tokens_fused[number] == len(fused)
        assert entry.tokens_full[number] == len(fused) + 25


def test_demonstration_of_several_pictures_costs_them_all_and_depends_on_their_order(compressor):
    one, other = (encode_picture(draw_picture(seed)) for seed in (0, 1))
    packs = []
    for images in ((one, other), (other, one), (one,), ()):
        entry = asyncio.run(compressor.register([Demonstration(images, "This is", "bako")]))
        packs.append(asyncio.run(compressor.load(entry.id)))
    assert [pack.entry.tokens_full for pack in packs] == [(50 + 6,), (50 + 6,), (25 + 6,), (6,)]
    assert [pack.entry.tokens_fused for pack in packs] == [(6,)] * 4
    for number, pack in enumerate(packs):
        assert all(np.abs(pack.fused[0] - more.fused[0]).max() > 1e-3 for more in packs[:number])


def test_known_demonstrations_are_not_read_again(compressor, monkeypatch):
    entry = asyncio.run(compressor.register(demonstrations(2)))

    def refuse(*arguments, **more):
        raise AssertionError("the backbone read a demonstration that the bank holds")

    for part in ("prepare", "see", "read"):
        monkeypatch.setattr(compressor.backbone, part, refuse)
    assert asyncio.run(compressor.register(demonstrations(2))) == entry


def test_damaged_pack_is_made_again_when_its_demonstrations_come_back(compressor, tmp_path):
    entry = asyncio.run(compressor.register(demonstrations(2)))
    file = tmp_path / "bank" / f"{entry.id}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert asyncio.run(compressor.register(demonstrations(2))) == entry
    assert asyncio.run(compressor.load(entry.id)).entry == entry


def test_pack_of_another_adapter_is_not_used(model, compressor, tmp_path):
    entry = asyncio.run(compressor.register(demonstrations(1)))
    retrained = Aim(load_backbone(model / "backbone"), AimConfig())
    torch.nn.init.constant_(retrained.aggregator.norm.weight, 0.5)
    retrained.save(tmp_path / "retrained", {})
    other = Compressor(model / "backbone", tmp_path / "retrained", tmp_path / "bank", MAX_PIXELS)
    with pytest.raises(ValueError, match="made for adapter"):
        asyncio.run(other.describe(entry.id))
    assert asyncio.run(other.register(demonstrations(1))).id != entry.id


def test_adapter_of_another_backbone_is_refused_when_the_replica_is_made(model, tmp_path):
    Aim(tiny_backbone(), AimConfig()).save(tmp_path / "foreign", {})
    with pytest.raises(CheckpointError, match="is for backbone 'tiny-0', here it is '[0-9a-f]+'"):
        Compressor(model / "backbone", tmp_path / "foreign", tmp_path / "bank", MAX_PIXELS)


def test_adapter_of_another_method_is_refused_when_the_replica_is_made(model, tmp_path):
    soft = PromptTuning(load_backbone(model / "backbone"), PromptTuningConfig(tokens=2))
    soft.save(tmp_path / "soft", {})
    with pytest.raises(
        CheckpointError, match=r"of method 'prompt_tuning', but .* AIM adapter in serve\.adapter"
    ):
        Compressor(model / "backbone", tmp_path / "soft", tmp_path / "bank", MAX_PIXELS)


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
        asyncio.run(compressor.register([*demonstrations(1), Demonstration((image,), question_text, "bako")]))
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
    prepared = generator.prepare(asked.pictures)

    def embed(piece):
        if piece.kind == "image":
            return backbone.see(join([prepared[piece.reference]]))
        return backbone.model.get_input_embeddings()(torch.tensor(piece.ids))

    embeds_BLD = torch.cat(
        [
            *map(embed, chat.prefix()),
            *map(torch.tensor, asked.fused),
            *(embed(piece) for turn in asked.turns for piece in chat.turn(turn)),
        ]
    )[None]
    mask_BL = torch.ones(embeds_BLD.shape[:2], dtype=torch.long)
    nothing_BL = torch.zeros_like(mask_BL, dtype=torch.bool)
    prompt = Embedded(embeds_BLD, mask_BL, nothing_BL, nothing_BL, mask_BL.cumsum(1) - 1)
    (ids,) = generate(backbone, prompt, asked.max_new_tokens)
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


def test_all_pictures_of_a_question_reach_the_model_in_their_order(generator):
    pictures = {key: encode_picture(draw_picture(seed)) for key, seed in (("a", 1), ("b", 2))}
    orders = [("a", "b"), ("b", "a"), ("a", "a"), ("b", "b")]
    asked = [question(about=about, pictures=pictures) for about in orders]
    answers = [asyncio.run(generator.answer(one)) for one in asked]
    one_picture = asyncio.run(generator.answer(question(about=("a",), pictures=pictures)))
    for one, answer in zip(asked, answers, strict=True):
        assert (answer.text, answer.completion_tokens) == expected_answer(generator, one)
        assert answer.prompt_tokens == one_picture.prompt_tokens + 25
    assert len({answer.text for answer in answers}) == len(orders)


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

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from mmicl_core.backbones.decoding import generate
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.backbones.vision import join
from mmicl_core.config.model import MmictConfig
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.base import ONE_BY_ONE, episode_turns
from mmicl_core.methods.hub import Hub
from mmicl_core.methods.mmict import Mmict, MmictBatch
from mmicl_core.prompts import Turn
from tests.fakes import PlainEngine, draw_picture, episode_row, tiny_backbone
from tests.families import write_model
from tests.family_parts import make_question_tokenizer

PICTURES = [f"p{number}" for number in range(6)]
# Those of the Q-Formers in `tests.families`.
SIZES = {"queries": 5, "width": 16, "layers": 2, "heads": 2, "hidden": 32}
FAMILIES = ("blip_2_t5", "instructblip", "qwen2_5_vl")
DESIGNS = ("image_text", "text", "image", "none")
ROWS = [
    episode_row(["p0", "p1", "p2"], ["bako", "mute", "bako"]),
    episode_row(["p2", "p3", "p4", "p1", "p5"], ["sidu", "goma", "goma", "sidu", "goma"], "This is surely"),
]
# 32-bit sums in another order differ in the last bits; soft tokens are of the order of 1.
LAST_BITS = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        write_model(name, folder / name)
    return folder


def _method(backbone: HuggingFaceBackbone | None = None, **settings: Any) -> Mmict:
    torch.manual_seed(0)
    return Mmict(backbone or tiny_backbone(), MmictConfig(**SIZES | settings))


def _pictures(backbone: HuggingFaceBackbone) -> dict[str, PreparedPicture]:
    drawn = [draw_picture(number, side=56 + 14 * number) for number in range(len(PICTURES))]
    return dict(zip(PICTURES, backbone.prepare(drawn), strict=True))


def _batch(method: Mmict, rows: Sequence[Mapping[str, Any]], side: Any = "right") -> MmictBatch:
    return method.collate(rows, _pictures(method.backbone), None, side)


def _soft(method: Mmict, *conversations: Sequence[Turn], **pictures: PreparedPicture) -> list[Tensor]:
    """The soft tokens of each turn that gives any, in the order of the turns."""
    batch = method.arrange(conversations, _pictures(method.backbone) | pictures)
    embeds_BLD = method.embed(batch).embeds_BLD.detach()
    lengths = [kept for kept in batch.shown.kept_NL.sum(1).tolist() if kept]
    return list(embeds_BLD[batch.packed.fused_BL].split(lengths))


def _unanswered(row: Mapping[str, Any]) -> dict[str, Any]:
    *shown, query = row["turns"]
    return {**row, "turns": [*shown, query | {"answer": None}]}


def _uneven(backbone: HuggingFaceBackbone) -> dict[str, PreparedPicture]:
    """Pictures whose numbers of states differ, as those of Qwen-VL do."""
    rng = np.random.default_rng(0)
    return {
        f"u{count}": PreparedPicture((), features=rng.normal(size=(count, backbone.vision_width)))
        for count in (3, 25, 11)
    }


def test_soft_tokens_are_unchanged_by_batch_neighbours_and_their_padding() -> None:
    method = _method()
    pictures = _uneven(method.backbone)
    turns = [
        Turn(("u3",), "This is", "bako"),
        Turn(("u25",), "This is surely a", "mutedi"),
        Turn(("u11",), "This", "ko"),
    ]
    query = Turn((), "This is", None)
    together = _soft(method, [*turns, query], **pictures)
    apart = [_soft(method, [turn, query], **pictures)[0] for turn in turns]
    backwards = _soft(method, [query], [*turns[::-1], query], **pictures)[::-1]
    assert len({len(soft) for soft in together}) == 3
    for one, two, three in zip(together, apart, backwards, strict=True):
        torch.testing.assert_close(one, two, **LAST_BITS)
        torch.testing.assert_close(one, three, **LAST_BITS)


def test_text_of_a_demonstration_is_guided_by_its_picture_unless_the_design_forbids() -> None:
    for design, guided in (("image_text", True), ("text", False)):
        method = _method(demonstrations=design)
        one, other = (
            _soft(method, [Turn((key,), "This is", "bako"), Turn((), "q", None)])[0] for key in ("p0", "p1")
        )
        text_one, text_other = one[:-1], other[:-1]
        assert one.shape == other.shape
        # Every token of the text has met the queries, which have seen the picture.
        assert bool(((text_one - text_other).abs().amax(1) > 1e-4).all()) is guided
        assert torch.equal(one[-1], other[-1])
        assert torch.equal(one, other) is not guided


def test_visual_tokens_of_a_query_are_guided_by_its_question_and_never_by_its_answer() -> None:
    method = _method()

    def visual(question: str, answer: str | None) -> Tensor:
        return _soft(method, [Turn(("p0",), question, answer, scored=True)])[0]

    asked = visual("This is", None)
    assert asked.shape == (5, method.backbone.width)
    torch.testing.assert_close(visual("This is", "bako"), asked, **LAST_BITS)
    assert ((visual("What colour", None) - asked).abs().amax(1) > 1e-4).all()


def test_prompt_is_the_soft_tokens_then_the_query_with_its_visual_tokens_in_place_of_its_picture() -> None:
    method = _method()
    packed = _batch(method, ROWS[:1]).packed
    assert not packed.image_BL.any()
    tokens = [len(method.backbone.tokenizer(f"This is {name}")["input_ids"]) for name in ("bako", "mute")]
    before, question, answer = (
        piece for piece in [*method.chat.prefix(), *method.chat.turn(episode_turns(ROWS[0])[-1])] if piece.ids
    )
    assert packed.fused_BL[0].tolist() == [
        *[False] * len(before.ids),
        *[True] * (tokens[0] + 1 + tokens[1] + 1),
        *[True] * 5,
        *[False] * (len(question.ids) + len(answer.ids)),
    ]
    assert packed.ids_BL[0][~packed.fused_BL[0]].tolist() == [*before.ids, *question.ids, *answer.ids]
    assert packed.labels_BL[0][packed.answer_BL[0]].tolist() == list(answer.ids)


@pytest.mark.parametrize("design", DESIGNS)
def test_designs_give_a_demonstration_the_tokens_that_they_keep_of_it(design: Any) -> None:
    method = _method(demonstrations=design)
    turn = Turn(("p0",), "This is", "bako")
    text = len(method.backbone.tokenizer("This is bako")["input_ids"])
    expected = {"image_text": text + 1, "text": text + 1, "image": 5 + 1, "none": 0}[design]
    assert method.demonstration_tokens(turn, {}) == expected
    without, shown = (
        method.arrange([[*turns, Turn(("p1",), "This is", None)]], _pictures(method.backbone))
        for turns in ([], [turn, turn])
    )
    assert int(shown.packed.fused_BL.sum()) == int(without.packed.fused_BL.sum()) + 2 * expected
    assert shown.packed.ids_BL.shape[1] == without.packed.ids_BL.shape[1] + 2 * expected


def test_loss_depends_on_the_demonstrations_and_on_their_order() -> None:
    method = _method()
    turned = ROWS[0] | {"turns": [ROWS[0]["turns"][number] for number in (1, 0, 2)]}
    # The untrained model answers them differently; how much differs does not matter.
    assert (method(_batch(method, ROWS[:1])) - method(_batch(method, [turned]))).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
def test_loss_of_a_batch_is_that_of_its_episodes_alone(name: str, folders: Path) -> None:
    method = _method(tiny_backbone() if name == "tiny" else load_backbone(folders / name))
    together = method(_batch(method, ROWS))
    apart = torch.cat([method(_batch(method, [row])) for row in ROWS])
    assert together.isfinite().all()
    torch.testing.assert_close(together, apart, **LAST_BITS)


@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
def test_answers_behind_demonstrations_in_a_left_padded_batch_are_those_of_one_at_a_time(
    name: str, folders: Path
) -> None:
    method = _method(tiny_backbone() if name == "tiny" else load_backbone(folders / name)).eval()
    rows = [_unanswered(row) for row in ROWS]
    together = generate(method.backbone, method.embed(_batch(method, rows, "left")), 5)
    apart = [generate(method.backbone, method.embed(_batch(method, [row], "left")), 5)[0] for row in rows]
    assert together == apart
    zero_shot = [row | {"turns": row["turns"][-1:]} for row in rows]
    assert generate(method.backbone, method.embed(_batch(method, zero_shot, "left")), 5) != together


@pytest.mark.parametrize("design", DESIGNS)
def test_gradient_reaches_what_the_hub_trains_all_of_it_and_nothing_else(design: Any) -> None:
    method = _method(demonstrations=design, layers=4)
    method(_batch(method, ROWS)).sum().backward()
    reached = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert reached == method.trainable().keys()
    largest = {
        name: float(p.grad.abs().max()) for name, p in method.trainable().items() if p.grad is not None
    }
    # What is added to all keys alike moves no softmax: its gradient is what sums of zeros round to.
    biases = {name for name in largest if name.endswith("key.bias")}
    assert all(largest[name] < 1e-7 for name in biases)
    assert all(gradient > 1e-7 for name, gradient in largest.items() if name not in biases)
    last = method.hub.qformer.encoder.layer[-1]
    text_half = [*last.intermediate.parameters(), *last.output.parameters()]
    unread = {"image": text_half, "none": [*text_half, method.hub.separator]}.get(design, [])
    frozen = [parameter for parameter in method.hub.parameters() if not parameter.requires_grad]
    assert {id(parameter) for parameter in frozen} == {id(parameter) for parameter in unread}


def test_every_batch_of_a_training_runs_the_same_modules(folders: Path) -> None:
    method = _method()
    method.looks = True
    called: list[str] = []
    for name, module in method.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    method(batch := _batch(method, ROWS))
    usual = list(called)
    called.clear()
    # Workers that wait for each other's weights would wait for ever.
    method(bare := method.arrange([[Turn((), "", "ko", scored=True)]], {}))
    assert called == usual
    assert method.calls(batch) == {"pictures": len(batch.shown.pictures)}
    assert method.calls(bare) == {"pictures": 1}
    of_any_size = _method(load_backbone(folders / "qwen2_5_vl"))
    of_any_size.looks = True
    assert of_any_size.calls(batch) == {ONE_BY_ONE: len(batch.shown.pictures)}


def test_dropout_is_for_training_alone() -> None:
    method = _method(dropout=0.5)
    batch = _batch(method, ROWS)
    assert not torch.equal(method(batch), method(batch))
    method.eval()
    assert torch.equal(method(batch), method(batch))


def test_states_kept_in_16_bits_train_under_autocast_as_pixels_do_but_for_rounding() -> None:
    method = _method()
    pixels = _pictures(method.backbone)
    states = method.backbone.vision.tower_states(list(pixels.values()))
    kept = {
        key: PreparedPicture(picture.ids, features=state.half().numpy())
        for (key, picture), state in zip(pixels.items(), states, strict=True)
    }
    whole = method(method.collate(ROWS, pixels, None))
    torch.testing.assert_close(method(method.collate(ROWS, kept, None)), whole, rtol=2e-3, atol=2e-3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method(method.collate(ROWS, kept, None))
    rounded.sum().backward()
    assert method.hub.queries.grad is not None and method.hub.queries.grad.isfinite().all()
    # Eight bits of mantissa.
    torch.testing.assert_close(rounded, whole, rtol=0.05, atol=0.05)


def test_hub_learns_two_episodes_by_heart() -> None:
    method = _method()
    engine = PlainEngine(method, learning_rate=1e-2)
    batch = _batch(method, ROWS)
    first = float(method(batch).detach().mean())
    for _ in range(40):
        engine.backward(method(batch).mean())
        engine.step(1.0)
    # Few answer tokens and a hub of some ten thousand weights before a frozen, untrained model.
    assert float(method(batch).detach().mean()) < first / 2


def test_turns_without_pictures_are_read_and_a_query_without_one_has_no_visual_tokens() -> None:
    method = _method()
    text = [Turn((), "This is", "bako"), Turn((), "This", "ko", scored=True)]
    mixed = [Turn(("p0",), "This is", "bako"), Turn((), "This", "ko", scored=True)]
    alone = method.arrange([text], {})
    assert int(alone.packed.fused_BL.sum()) == method.demonstration_tokens(text[0], {})
    nll = method(alone)
    nll.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.trainable().values())
    together = method(method.arrange([mixed, text], _pictures(method.backbone)))
    torch.testing.assert_close(together[-len(nll) :], nll, **LAST_BITS)
    only_query = method(method.arrange([[Turn((), "", "ko", scored=True)]], {}))
    assert only_query.isfinite().all()


def test_several_pictures_of_a_turn_are_seen_as_one() -> None:
    method = _method()
    pictures = _uneven(method.backbone)
    joined = np.concatenate([pictures[key].features for key in ("u3", "u11")])
    pictures["both"] = PreparedPicture((), features=joined)

    def soft(*keys: str) -> list[Tensor]:
        return _soft(method, [Turn(keys, "This is", "bako"), Turn(keys, "This", None)], **pictures)

    several, one = soft("u3", "u11"), soft("both")
    assert [len(tokens) for tokens in several] == [len(tokens) for tokens in one]
    torch.testing.assert_close(torch.cat(several), torch.cat(one), **LAST_BITS)


def test_text_that_is_too_long_loses_its_beginning_and_is_counted() -> None:
    method = _method(longest_text=4)
    query = Turn((), "This is", None)
    long = Turn(("p0",), "This is surely a red cat and that is", "bako")
    (soft,) = _soft(method, [long, query])
    assert (len(soft), method.cut) == (4 + 1, {"texts": 1})
    assert method.demonstration_tokens(long, {}) == 4 + 1
    ids = method.backbone.tokenizer(f"{long.question} {long.answer}")["input_ids"]
    shown = method.arrange([[long, query]], _pictures(method.backbone)).shown
    assert shown.ids_NT[0].tolist() == ids[-4:]
    assert method.cut == {"texts": 2}


def test_hub_of_the_paper_has_the_parameters_that_its_shapes_give() -> None:
    words, positions, queries, width, hidden, states, language = 30_523, 512, 32, 768, 3072, 1408, 2048
    with torch.device("meta"):
        hub = Hub(MmictConfig(), vocabulary=words, vision_width=states, width=language)
    norm = 2 * width
    self_attention = 4 * (width * width + width) + norm
    cross_attention = 2 * (width * width + width) + 2 * (states * width + width) + norm
    feed_forward = 2 * width * hidden + hidden + width + norm
    reading = 12 * (self_attention + feed_forward) + 6 * cross_attention + norm
    text = 12 * feed_forward + (words + positions) * width
    ends = queries * width + 2 * states + (width + 1) * language + language
    assert sum(parameter.numel() for parameter in hub.parameters()) == reading + text + ends
    # Section 4.2 of the facts on MMICT, in millions.
    assert [round(count / 1e6, 1) for count in (reading, text, reading + text + ends)] == [105.1, 80.5, 187.3]


def test_hub_that_begins_as_an_instructblip_gives_the_visual_tokens_of_that_model(folders: Path) -> None:
    folder = folders / "instructblip"
    backbone = load_backbone(folder)
    method = _method(backbone, start=str(folder))
    pictures = _pictures(backbone)
    for key, question in (("p0", "What colour is it?"), ("p1", "Is it a cat?")):
        (visual,) = _soft(method, [Turn((key,), question, None)])
        torch.testing.assert_close(visual, backbone.see(join([pictures[key]], [question])), **LAST_BITS)


# Scale, shift, separator; of BLIP-2 also two embeddings and, in two layers, weight and bias of three modules.
@pytest.mark.parametrize(("name", "absent"), [("blip_2_t5", 3 + 2 + 2 * 3 * 2), ("instructblip", 3)])
def test_hub_begins_with_what_a_model_has_and_says_how_much(
    name: str, absent: int, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mmicl")
    fresh = _method(load_backbone(folders / name))
    method = _method(load_backbone(folders / name), start=str(folders / name))
    saved = load_file(folders / name / "model.safetensors")
    assert torch.equal(method.hub.queries, saved["query_tokens"])
    assert torch.equal(method.hub.projection.weight, saved["language_projection.weight"])
    layer = "encoder.layer.0.crossattention.attention.key.weight"
    assert torch.equal(method.hub.qformer.state_dict()[layer], saved[f"qformer.{layer}"])
    embeddings = "qformer.layernorm.weight" if name == "blip_2_t5" else "qformer.embeddings.layernorm.weight"
    assert torch.equal(method.hub.qformer.embeddings.layernorm.weight, saved[embeddings])
    assert torch.equal(method.hub.separator, fresh.hub.separator)
    count = len(method.trainable())
    assert f"begins with {count - absent} of its {count} tensors" in caplog.text
    assert f"{absent} keep their initial values" in caplog.text


def test_hub_begins_as_a_retrieval_model_with_its_text_half_and_tokenizer(
    folders: Path, tmp_path: Path
) -> None:
    config = Blip2Config.from_pretrained(folders / "blip_2_t5")
    config.qformer_config.use_qformer_text_input = True
    torch.manual_seed(1)
    source = Blip2ForImageTextRetrieval(config)
    source.save_pretrained(tmp_path)
    make_question_tokenizer().save_pretrained(tmp_path)
    method = _method(load_backbone(folders / "blip_2_t5"), start=str(tmp_path))
    ours, theirs = method.hub.qformer.state_dict(), source.state_dict()
    for name in ("word_embeddings.weight", "position_embeddings.weight"):
        assert torch.equal(ours[f"embeddings.{name}"], theirs[f"embeddings.{name}"])
    for part in ("intermediate.dense.weight", "output.dense.bias"):
        assert torch.equal(ours[f"encoder.layer.1.{part}"], theirs[f"qformer.encoder.layer.1.{part}"])
    ids = make_question_tokenizer()("This is bako")["input_ids"]
    assert method.demonstration_tokens(Turn((), "This is", "bako"), {}) == len(ids) + 1


def test_tokenizer_that_marks_the_ends_of_a_text_keeps_both_marks_of_a_text_that_is_cut(
    folders: Path,
) -> None:
    method = _method(load_backbone(folders / "instructblip"), longest_text=4)
    shown = method.arrange([[Turn((), "This is a red", "cat"), Turn((), "This", None)]], {}).shown
    ids = method.tokenizer("This is a red cat")["input_ids"]
    assert len(ids) > 4
    assert shown.ids_NT[0].tolist() == [ids[0], *ids[-3:]]
    assert ids[0] != ids[-1] and {ids[0], ids[-1]} <= set(method.tokenizer.all_special_ids)


def test_saved_hub_answers_as_it_did(folders: Path, tmp_path: Path) -> None:
    for number, (backbone, settings) in enumerate(
        [
            (tiny_backbone(), {"demonstrations": "image"}),
            (load_backbone(folders / "instructblip"), {}),
            # Its tokenizer comes from elsewhere and has to be saved too.
            (load_backbone(folders / "qwen2_5_vl"), {"start": str(folders / "instructblip")}),
        ]
    ):
        folder = tmp_path / str(number)
        first = _method(backbone, **settings)
        with torch.no_grad():
            for parameter in first.trainable().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        first.save(folder, {})
        torch.manual_seed(1)
        second = Mmict(backbone, MmictConfig(**SIZES | settings | {"start": str(folder)}))
        assert second.trainable().keys() == first.trainable().keys()
        assert torch.equal(first(_batch(first, ROWS)), second(_batch(second, ROWS)))


def test_model_of_other_sizes_is_refused_with_both(folders: Path) -> None:
    start = str(folders / "instructblip")
    backbone = load_backbone(folders / "instructblip")
    with pytest.raises(CheckpointError, match=r"has heads 2, method\.heads is 4"):
        _method(backbone, start=start, heads=4)
    with pytest.raises(CheckpointError, match=r"has queries 5, method\.queries is 7"):
        _method(backbone, start=start, queries=7)
    with pytest.raises(CheckpointError, match=r"post_layernorm\.weight is \(24,\) there, \(32,\) here"):
        _method(tiny_backbone(), start=start)


def test_folder_that_no_hub_can_begin_as_is_refused(folders: Path, tmp_path: Path) -> None:
    backbone = tiny_backbone()
    with pytest.raises(CheckpointError, match="holds no adapter and no model"):
        _method(backbone, start=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="model of type 'qwen2_5_vl'"):
        _method(backbone, start=str(folders / "qwen2_5_vl"))
    torn = tmp_path / "torn"
    shutil.copytree(folders / "blip_2_t5", torn)
    weights = torn / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        _method(backbone, start=str(torn))
    weights.unlink()
    with pytest.raises(CheckpointError, match="holds no Q-Former"):
        _method(backbone, start=str(torn))
    (torn / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="configuration in .* cannot be read"):
        _method(backbone, start=str(torn))
    without = tmp_path / "without"
    shutil.copytree(folders / "instructblip", without)
    for path in (without / "qformer_tokenizer").iterdir():
        path.write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer in .* cannot be loaded"):
        _method(backbone, start=str(without))

"""Every family and every method: the same numbers by another way.

The models are tiny and random, with the processors of their kind (`tests.families`). What "equal" means is
the last bits of 32-bit sums taken in another order: scores are of the order of 1, so 1e-4 is far above what
another order can change and far below what a wrong position, mask or token does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_core.backbones.decoding import Decoding
from mmicl_core.backbones.hugging_face import (
    ROLES,
    HuggingFaceBackbone,
    is_model_folder,
    load_backbone,
)
from mmicl_core.backbones.vision import join
from mmicl_core.data.collate import NOT_SCORED, Packed, pack
from mmicl_core.data.pictures import VISUAL, PreparedPicture
from mmicl_core.errors import CheckpointError
from mmicl_core.methods import METHODS, load_method
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Method, Plain
from mmicl_core.prompts import Turn
from tests.fakes import draw_picture
from tests.families import NAMES, write_model
from tests.methods import METHOD_NAMES, answered, batch_rows, make_method, unanswered

LAST_BITS = {"atol": 1e-4, "rtol": 1e-4}
SIXTEEN_BITS = {"atol": 1e-2, "rtol": 1e-2}
# Of different shapes, where a family makes different numbers of tokens of them.
SHAPES = ((40, 60), (64, 30), (50, 50), (40, 60))
GENERATED = 4


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")

    @cache
    def folder(name: str) -> Path:
        write_model(name, root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def plain_models(models: Any) -> Any:
    return cache(lambda name: load_backbone(models(name)))


@pytest.fixture
def backbone(models: Any, plain_models: Any, request: pytest.FixtureRequest) -> HuggingFaceBackbone:
    family = request.getfixturevalue("family")
    name = request.getfixturevalue("method_name") if "method_name" in request.fixturenames else None
    if name is not None and METHODS[name].changes_backbone:
        # What a method trains inside a model, the next test must not find.
        return load_backbone(models(family))
    return plain_models(family)


def see(backbone: HuggingFaceBackbone) -> dict[str, PreparedPicture]:
    pictures = [draw_picture(number).resize(shape) for number, shape in enumerate(SHAPES)]
    return dict(zip("abcd", backbone.prepare(pictures), strict=True))


every_family = pytest.mark.parametrize("family", NAMES)
every_method = pytest.mark.parametrize("method_name", METHOD_NAMES)


@every_family
def test_every_parameter_of_a_family_has_one_role(family: str, backbone: HuggingFaceBackbone) -> None:
    found = [name for role in ROLES for name, _ in backbone.role_parameters(role)]
    assert len(found) == len(set(found))
    assert set(found) == {name for name, _ in backbone.model.named_parameters()}
    for role in ("vision_tower", "projector", "language_model"):
        assert list(backbone.role_parameters(role)), role


@every_family
def test_prompt_with_pictures_has_the_likelihood_that_the_model_gives_it_by_its_ids(
    family: str, backbone: HuggingFaceBackbone
) -> None:
    method = Plain(backbone)
    with torch.no_grad():
        for row in batch_rows():
            batch = method.collate([row], see(backbone), None)
            torch.testing.assert_close(method(batch), by_ids(backbone, batch), **LAST_BITS)


@every_family
def test_fused_tokens_that_are_the_real_embeddings_give_the_likelihood_of_the_real_text(
    family: str, backbone: HuggingFaceBackbone
) -> None:
    chat, pictures = backbone.chat, see(backbone)
    shown = [Turn((), "This is", "bako"), Turn((), "What is this?", "mute")]
    query = Turn(("a", "b"), "This is", "bako", scored=True)
    ids = [token for turn in shown for piece in chat.turn(turn) for token in piece.ids]
    given = [pictures[key] for key in query.pictures]
    filling = {"pictures": given, "padding_id": backbone.tokenizer.pad_token_id}
    fused = pack([chat.conversation([query], fused=1)], fused_tokens=[len(ids)], **filling)
    plain = pack([chat.conversation([*shown, query])], **filling)
    with torch.no_grad():
        visual = backbone.see(join(given, [query.question] * 2))
        words = backbone.model.get_input_embeddings()(torch.tensor(ids))
        behind_fused = backbone.answer_nll(backbone.embed(fused, visual, words), fused)
        behind_text = backbone.answer_nll(backbone.embed(plain, visual), plain)
    torch.testing.assert_close(behind_fused, behind_text, **LAST_BITS)


@every_family
def test_picture_alone_becomes_what_it_becomes_beside_others(
    family: str, backbone: HuggingFaceBackbone
) -> None:
    pictures = list(see(backbone).values())
    questions = ["This is"] * len(pictures)
    with torch.no_grad():
        together = backbone.see(join(pictures, questions))
        apart = [backbone.see(join([one], ["This is"])) for one in pictures]
    torch.testing.assert_close(together, torch.cat(apart), **LAST_BITS)
    assert [len(one) for one in apart] == [sum(token == VISUAL for token in one.ids) for one in pictures]


@every_family
def test_turn_without_a_picture_has_the_likelihood_that_the_language_model_gives_it(
    family: str, backbone: HuggingFaceBackbone
) -> None:
    method = Plain(backbone)
    with torch.no_grad():
        batch = method.collate([answered([], ["bako"])], {}, None)
        torch.testing.assert_close(method(batch), by_ids(backbone, batch), **LAST_BITS)


@every_family
@pytest.mark.parametrize("method_name", [name for name in METHOD_NAMES if name != "mtv"])
def test_gradient_reaches_all_parameters_of_a_method_and_nothing_else(
    family: str, method_name: str, backbone: HuggingFaceBackbone
) -> None:
    method = make_method(method_name, backbone).train()
    owned = method.trainable()
    method(method.collate(batch_rows(), see(backbone), None)).sum().backward()
    moved = {name for name, p in method.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == set(owned)
    for name, module in backbone.model.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            assert not module.training, name
    if method_name == "lora":
        assert not any(module.training for module in backbone.model.modules() if _drops(module))


@every_family
@every_method
def test_prompt_does_not_depend_on_its_batch_neighbours_or_on_the_side_of_padding(
    family: str, method_name: str, backbone: HuggingFaceBackbone
) -> None:
    method = make_method(method_name, backbone)
    pictures, rows = see(backbone), batch_rows()
    with torch.no_grad():
        together = method(method.collate(rows, pictures, None))
        apart = [method(method.collate([row], pictures, None)) for row in rows]
        left = method(method.collate(rows, pictures, None, side="left"))
    torch.testing.assert_close(together, torch.cat(apart), **LAST_BITS)
    torch.testing.assert_close(left, together, **LAST_BITS)


@every_family
@every_method
def test_answers_grow_with_kept_keys_and_values_as_they_do_without(
    family: str, method_name: str, backbone: HuggingFaceBackbone
) -> None:
    method = make_method(method_name, backbone)
    pictures, rows = see(backbone), unanswered(batch_rows())
    with torch.no_grad():
        batch = method.collate(rows, pictures, None, side="left")
        said = answers(method, batch)
        alone = [answers(method, method.collate([row], pictures, None, side="left"))[0] for row in rows]
        assert said == alone
        if backbone.family.decoder is None:
            for row, ids in zip(rows, said, strict=True):
                one = method.collate([row], pictures, None, side="left")
                for count, token in enumerate(ids):
                    scores = recomputed(method, one, ids[:count])
                    assert int(scores.argmax()) == token


@every_family
def test_answers_that_are_kept_grow_as_they_do_beside_the_others(
    family: str, backbone: HuggingFaceBackbone
) -> None:
    method = Plain(backbone)
    rows = unanswered(batch_rows())
    with torch.no_grad():
        prompts = method.embed(method.collate(rows, see(backbone), None, side="left"))
        some, every, last = Decoding(backbone, prompts), Decoding(backbone, prompts), len(rows) - 1
        some.keep([last, 0, last])
        for token in (20, 30, 40):
            some.feed(torch.tensor([token, token + 1, token + 2]))
            every.feed(torch.tensor([token + 1, *[5] * (last - 1), token]))
            torch.testing.assert_close(some.scores_BV[0], every.scores_BV[last], **LAST_BITS)
            torch.testing.assert_close(some.scores_BV[1], every.scores_BV[0], **LAST_BITS)
        assert not torch.allclose(some.scores_BV[2], some.scores_BV[0], **LAST_BITS)


@every_family
def test_greedy_text_is_what_the_library_itself_generates(family: str, backbone: HuggingFaceBackbone) -> None:
    method = Plain(backbone)
    row = unanswered(batch_rows())[1]
    with torch.no_grad():
        batch = method.collate([row], see(backbone), None, side="left")
        (said,) = answers(method, batch)
        given = named_inputs(backbone, batch)
        ids = backbone.model.generate(
            **given, max_new_tokens=GENERATED, do_sample=False, pad_token_id=method.padding_id
        )[0]
    new = ids if backbone.family.decoder else ids[batch.packed.ids_BL.shape[1] :]
    start = backbone.text_config.decoder_start_token_id if backbone.family.decoder else None
    theirs = [token for token in new.tolist() if token != start]
    end = backbone.tokenizer.eos_token_id
    assert said == (theirs[: theirs.index(end)] if end in theirs else theirs)


@pytest.fixture(scope="session")
def saved(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method around every family, saved, with what it said before."""
    root = tmp_path_factory.mktemp("adapters")
    for family in NAMES:
        for method_name in METHOD_NAMES:
            backbone = load_backbone(models(family))
            method = make_method(method_name, backbone)
            folder = root / f"{family}-{method_name}"
            method.save(folder, {"backbone_name": family})
            said = reloaded(models(family).parent, folder)
            # A whole model is kept in 16 bits; weights that lie elsewhere in memory may be summed up in
            # another order.
            bounds = SIXTEEN_BITS if method_name == "lcl" else LAST_BITS
            torch.testing.assert_close(said, likelihood(method, backbone), **bounds)
            torch.save(said, folder / "said.pt")
    return root


def test_saved_method_says_the_same_in_another_process(models: Any, saved: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.unit.backbones.test_parity import compare_saved; "
        "compare_saved(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    families = models(NAMES[0]).parent
    told = subprocess.run(
        [sys.executable, "-c", script, str(families), str(saved)], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == sorted(folder.name for folder in saved.iterdir())


def compare_saved(families: Path, saved: Path) -> None:
    """Load every saved method and compare what it says; runs in a process of its own."""
    torch.set_num_threads(1)
    for folder in sorted(saved.iterdir()):
        assert torch.equal(reloaded(families, folder), torch.load(folder / "said.pt")), folder.name
        print(folder.name)


def reloaded(families: Path, folder: Path) -> Tensor:
    """What a saved method says: an adapter around its family's model, or a whole model by itself."""
    if is_model_folder(folder):
        backbone = load_backbone(folder)
        return likelihood(Plain(backbone), backbone)
    backbone = load_backbone(families / folder.name.rpartition("-")[0])
    return likelihood(load_method(folder, backbone), backbone)


@pytest.mark.parametrize("method_name", [name for name in METHOD_NAMES if name != "lcl"])
def test_saved_method_is_refused_by_another_family_size_or_method_with_the_first_difference(
    models: Any, method_name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    make_method(method_name, load_backbone(models("llava"))).save(folder, {})
    with pytest.raises(CheckpointError, match="model_type 'llava', here it is 'internvl'"):
        load_method(folder, load_backbone(models("internvl")))
    write_model("llava", tmp_path / "wider", size=48)
    with pytest.raises(CheckpointError, match="width 32, here it is 48"):
        load_method(folder, load_backbone(tmp_path / "wider"))
    other = make_method("aim" if method_name != "aim" else "lora", load_backbone(models("llava")))
    with pytest.raises(CheckpointError, match=f"method '{method_name}', here it is '{other.config.type}'"):
        load_parameters(other, folder)


def by_ids(backbone: HuggingFaceBackbone, batch: Any) -> Tensor:
    """Negative log-likelihood of the scored tokens by the model's own forward."""
    given = named_inputs(backbone, batch)
    labels = batch.packed.labels_BL
    # BLIP-2 and InstructBLIP insist on a picture; their language models do not.
    alone = not len(batch.pictures) and not backbone.family.root
    model = backbone.language_side if alone else backbone.model
    if backbone.family.decoder is not None:
        target = labels[labels != NOT_SCORED][None]
        start = torch.full((1, 1), backbone.text_config.decoder_start_token_id)
        logits = model(**given, decoder_input_ids=torch.cat([start, target[:, :-1]], dim=1)).logits
        return F.cross_entropy(logits[0], target[0], reduction="none")
    logits = model(**given).logits
    scored = labels[:, 1:] != NOT_SCORED
    return F.cross_entropy(logits[:, :-1][scored], labels[:, 1:][scored], reduction="none")


def named_inputs(backbone: HuggingFaceBackbone, batch: Any) -> dict[str, Any]:
    """One prompt as the library's own callers give it: ids with placeholders, pixels, types of tokens."""
    packed: Packed = batch.packed
    marker = backbone.vision.placeholder_id
    ids = packed.ids_BL.masked_fill(packed.image_BL, marker)
    kept = slice(None)
    if backbone.family.decoder is not None:
        # The answer stands in the decoder.
        kept = ~packed.answer_BL[0]
    given: dict[str, Any] = {"input_ids": ids[:, kept], "attention_mask": packed.mask_BL[:, kept]}
    given |= backbone.vision.inputs(batch.pictures) if len(batch.pictures) else {}
    if backbone.family.positions == "mrope":
        given["mm_token_type_ids"] = packed.image_BL.int()
    if backbone.family.attends == "pictures":
        given["token_type_ids"] = packed.image_BL.int()
    if backbone.family.attends == "prefix":
        given["token_type_ids"] = (packed.answer_BL.int().cumsum(1) > 0).int()
    return given


def likelihood(method: Method, backbone: HuggingFaceBackbone) -> Tensor:
    with torch.no_grad():
        return method(method.collate(batch_rows(), see(backbone), None))


def answers(method: Method, batch: Any) -> list[list[int]]:
    return method.answer(batch, GENERATED)


def recomputed(method: Method, batch: Any, ids: Sequence[int]) -> Tensor:
    """Scores of the token behind a prompt and `ids`, all of it computed anew."""
    prompts = method.embed(batch)
    if ids:
        given = torch.tensor([ids])
        words = method.backbone.model.get_input_embeddings()(given)
        first = prompts.last_positions() + 1
        positions = (first[:, None] + torch.arange(len(ids))).expand(*prompts.positions.shape[:-1], -1)
        ones = torch.ones_like(given)
        prompts = replace(
            prompts,
            embeds_BLD=torch.cat([prompts.embeds_BLD, words], dim=1),
            mask_BL=torch.cat([prompts.mask_BL, ones], dim=1),
            image_BL=torch.cat([prompts.image_BL, ones > 1], dim=1),
            answer_BL=torch.cat([prompts.answer_BL, ones > 0], dim=1),
            soft_BL=F.pad(prompts.soft_BL, (0, len(ids))) if prompts.soft_BL is not None else None,
            positions=torch.cat([prompts.positions, positions], dim=-1),
        )
    with method.applied(prompts):
        return Decoding(method.backbone, prompts).scores_BV[0]


def _drops(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Dropout)

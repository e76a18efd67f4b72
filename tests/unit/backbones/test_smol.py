from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.backbones.smol import build_smol
from mmicl_core.backbones.vision import join
from mmicl_core.data.embedding import load_mobilenet
from mmicl_core.methods.base import Plain
from mmicl_core.prompts import Turn
from tests.fakes import draw_picture
from tests.published import write_checkpoint, write_language_model

# A model is kept in 16 bits, of which 11 are digits.
SIXTEEN_BITS = {"rtol": 1e-3, "atol": 1e-3}
# The same operations in another order of memory.
LAST_BITS = {"rtol": 1e-4, "atol": 1e-4}


class Built(NamedTuple):
    backbone: HuggingFaceBackbone
    tower: Any
    language: Any
    """As the library reads its file."""
    file: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("parts")
    write_language_model(folder / "language.gguf")
    write_checkpoint(folder / "vision.pth")
    tower = load_mobilenet(folder / "vision.pth").mobilenet_v2
    language = AutoModelForCausalLM.from_pretrained(folder, gguf_file="language.gguf").eval()
    file = folder / "language.gguf"
    return Built(build_smol(file, tower, seed=0), tower, language, file)


@pytest.fixture(scope="module")
def saved(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smol")
    built.backbone.save(folder)
    return folder


def test_tower_and_language_model_are_the_published_ones(built: Built) -> None:
    backbone = built.backbone
    for name, weight in built.tower.state_dict().items():
        assert torch.equal(backbone.vision_tower.state_dict()[name], weight)
    ours = backbone.language_model.state_dict()
    for name, weight in built.language.model.state_dict().items():
        assert torch.equal(ours[name][: len(weight)], weight)
    assert backbone.head.weight is backbone.language_model.embed_tokens.weight


def test_text_is_scored_as_by_the_language_model_alone(built: Built) -> None:
    ids = built.backbone.tokenizer("This is bako", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = built.backbone.model(input_ids=ids).logits, built.language(input_ids=ids).logits
    torch.testing.assert_close(ours[..., :-1], theirs, **LAST_BITS)


def test_token_of_a_picture_is_added_behind_all_words_and_is_as_likely_as_their_mean(built: Built) -> None:
    tokenizer, words = built.backbone.tokenizer, built.language.get_input_embeddings().weight
    assert tokenizer.convert_tokens_to_ids("<image>") == len(words) == len(tokenizer) - 1
    assert built.backbone.model.config.image_token_id == len(words)
    torch.testing.assert_close(built.backbone.head.weight[-1], words.mean(0))


def test_every_picture_becomes_49_visual_tokens(built: Built) -> None:
    pictures = [draw_picture(number).resize(size) for number, size in enumerate(((72, 72), (300, 200)))]
    prepared = built.backbone.prepare(pictures)
    assert [len(picture.ids) for picture in prepared] == [49, 49]
    assert built.backbone.see(join(prepared)).shape == (98, built.backbone.width)


def test_projector_is_a_function_of_the_seed_and_takes_no_chance_from_others(built: Built) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again, other = (build_smol(built.file, built.tower, seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    first = built.backbone.projector.linear_1.weight
    assert torch.equal(again.projector.linear_1.weight, first)
    assert not torch.equal(other.projector.linear_1.weight, first)


def test_saved_folder_is_loaded_by_the_library_and_by_ours_with_the_same_weights(
    built: Built, saved: Path
) -> None:
    stock, ours = AutoModelForImageTextToText.from_pretrained(saved), load_backbone(saved)
    assert (ours.family.model_type, type(stock)) == ("fast_vlm", type(built.backbone.model))
    for model in (stock, ours.model):
        found = model.state_dict()
        for name, weight in built.backbone.model.state_dict().items():
            torch.testing.assert_close(found[name].to(weight.dtype), weight, **SIXTEEN_BITS)


def test_saved_folder_answers_and_says_nothing_of_where_it_was_made(built: Built, saved: Path) -> None:
    method = Plain(load_backbone(saved))
    pictures = dict(zip("ab", method.backbone.prepare([draw_picture(0), draw_picture(1)]), strict=True))
    turns = [Turn(("a",), "This is", "bako"), Turn(("b",), "This is", None)]
    answers = method.answer(method.arrange([turns], pictures, "left"), max_new_tokens=2)
    assert len(answers[0]) <= 2
    places = [str(built.file.parent).encode(), b".gguf"]
    small = [path for path in saved.iterdir() if path.suffix != ".safetensors"]
    assert not [path.name for path in small if any(place in path.read_bytes() for place in places)]


def test_weights_can_be_read_by_other_users(saved: Path) -> None:
    assert [path.stat().st_mode & 0o777 for path in saved.glob("*.safetensors")] == [0o644]


def test_turns_are_written_as_the_language_model_was_tuned_on_with_pictures_first(built: Built) -> None:
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    asked = [{"type": "image"}, {"type": "text", "text": "This is"}]
    said = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "bako"},
        {"role": "user", "content": "And?"},
    ]
    text = built.backbone.processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\n<image>\nThis is<|im_end|>\n"
        "<|im_start|>assistant\nbako<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )

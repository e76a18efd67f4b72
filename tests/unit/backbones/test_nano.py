from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.backbones.nano import PATCH_PIXELS, build_nano, whiten_patches
from mmicl_core.backbones.vision import join
from mmicl_core.data.collate import pack
from mmicl_core.data.names import SYLLABLES
from mmicl_core.data.pictures import VISUAL
from mmicl_core.prompts import Turn, count_text
from tests.fakes import draw_picture

LARGEST_MODEL_PARAMETERS = 15_000_000
FEWEST_VISUAL_TOKENS = 25
QUESTIONS = ("This is", "What is this?", "Name it:")
TEXTS = ["cat face", "banana", "bathtub", "domino", "kimono", "mountain", "pet", "tomato"]

STOCK_ONLY = """
import sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
processor = AutoProcessor.from_pretrained(sys.argv[1])
image = {"type": "image"}
messages = [
    {"role": "user", "content": [image, {"type": "text", "text": "This is"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "bako"}]},
    {"role": "user", "content": [image, {"type": "text", "text": "This is"}]},
]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
pictures = [Image.open(path) for path in sys.argv[2:4]]
inputs = processor(images=pictures, text=text, return_tensors="pt", add_special_tokens=False)
with torch.no_grad():
    np.save(sys.argv[4], model(**inputs).logits[0, -1].numpy())
assert not [name for name in sys.modules if name.partition(".")[0] in ("mmicl_core", "pipelines")]
"""


@pytest.fixture(scope="module")
def nano() -> HuggingFaceBackbone:
    return build_nano(TEXTS, [*SYLLABLES, *QUESTIONS])


def test_nano_is_small_and_reads_enough_visual_tokens(nano: HuggingFaceBackbone) -> None:
    assert sum(parameter.numel() for parameter in nano.parameters()) <= LARGEST_MODEL_PARAMETERS
    (prepared,) = nano.prepare([draw_picture(0)])
    visual_tokens = sum(token == VISUAL for token in prepared.ids)
    assert visual_tokens >= FEWEST_VISUAL_TOKENS
    # Nothing stands around them in a prompt.
    assert len(prepared.ids) == visual_tokens
    seen = nano.see(join([prepared]))
    assert seen is not None and len(seen) == visual_tokens
    assert len(nano.vision.tower_states([prepared])[0]) == visual_tokens


def test_made_up_names_are_two_tokens_whatever_words_the_corpus_holds(nano: HuggingFaceBackbone) -> None:
    for name in (one + other for one, other in permutations(SYLLABLES, 2)):
        tokens = len(nano.tokenizer(name, add_special_tokens=False)["input_ids"])
        # "tomato" may make one token of "mato"; no word may make three of a name.
        assert tokens == 2 or (tokens == 1 and any(name in text for text in TEXTS)), name


def test_demonstration_of_nano_costs_31_tokens_full_and_6_fused(nano: HuggingFaceBackbone) -> None:
    (prepared,) = nano.prepare([draw_picture(0)])
    text = count_text(nano.chat.turn(Turn(("a",), "This is", "bako")))
    assert (len(prepared.ids) + text, text) == (31, 6)


def test_tokenizer_gives_back_any_text(nano: HuggingFaceBackbone) -> None:
    for text in ("cat face", "Grüße, 你好 \U0001f431!", "  two  spaces\n"):
        ids = nano.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert nano.tokenizer.decode(ids) == text


def test_nano_is_the_same_for_the_same_texts_in_any_order(nano: HuggingFaceBackbone) -> None:
    again = build_nano(reversed(TEXTS), [*SYLLABLES, *QUESTIONS])
    assert again.tokenizer.get_vocab() == nano.tokenizer.get_vocab()
    weights = again.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in nano.model.state_dict().items())


def test_whitened_patches_differ_alike_in_every_direction() -> None:
    backbone = build_nano(TEXTS, [*SYLLABLES])
    pictures = [draw_picture(number) for number in range(40)]
    before = _spread_of_patches(backbone, pictures)
    whiten_patches(backbone, pictures)
    after = _spread_of_patches(backbone, pictures)
    # Blocks of one colour differ in a few dozen directions; those are compared.
    assert before[0] / before[19] > 5
    assert after[0] / after[19] < 2


def _spread_of_patches(backbone: HuggingFaceBackbone, pictures: list[Image.Image]) -> torch.Tensor:
    """Spread of the patch embeddings along their principal directions, largest first."""
    pixels = join(backbone.prepare(pictures)).inputs["pixel_values"]
    with torch.no_grad():
        seen = backbone.vision_tower.embeddings.patch_embedding(pixels)
    rows = seen.permute(0, 2, 3, 1).reshape(-1, seen.shape[1])
    return torch.linalg.svdvals(rows - rows.mean(0))


def test_positions_begin_more_alike_the_nearer_they_lie(nano: HuggingFaceBackbone) -> None:
    places = nano.vision_tower.embeddings.position_embedding.weight[1:].detach()
    side = nano.model.config.vision_config.image_size // PATCH_PIXELS
    corner = (places - places[0]).norm(dim=1).reshape(side, side)
    for line in (corner[0], corner[:, 0], corner.diagonal()):
        assert all(near < far for near, far in pairwise(line))


def test_saved_nano_gives_the_same_scores_with_nothing_of_ours_imported(
    nano: HuggingFaceBackbone, tmp_path: Path
) -> None:
    folder = tmp_path / "nano"
    nano.save(folder)
    pictures = [draw_picture(number) for number in range(2)]
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    scores = tmp_path / "scores.npy"
    # No PYTHONPATH and another working folder: the repository cannot be found.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", STOCK_ONLY, str(folder), *paths, str(scores)]
    subprocess.run(command, check=True, cwd=tmp_path, env=clean)
    # The saved weights are rounded to 16 bits, so the same rounded ones are compared: what is left
    # is the order of 32-bit sums.
    expected = _scores_by_our_prompt(load_backbone(folder), pictures)
    np.testing.assert_allclose(np.load(scores), expected, atol=1e-4)
    # And against the model before it was saved: 11 bits of a weight are good for three digits.
    np.testing.assert_allclose(np.load(scores), _scores_by_our_prompt(nano, pictures), atol=2e-2)


def _scores_by_our_prompt(backbone: HuggingFaceBackbone, pictures: list[Image.Image]) -> np.ndarray:
    turns = [Turn(("0",), "This is", "bako"), Turn(("1",), "This is", None)]
    prepared = backbone.prepare(pictures)
    packed = pack([backbone.chat.conversation(turns)], pictures=prepared, padding_id=0)
    with torch.no_grad():
        prompt = backbone.embed(packed, backbone.see(join(prepared)))
        return backbone.logits(backbone.read(prompt).last_hidden_state[0, -1]).numpy()

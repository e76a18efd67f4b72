"""What a new nano can do before its first step: look back, find, and name what it was shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from PIL import Image

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.induction import start_projector
from mmicl_core.backbones.nano import build_nano
from mmicl_core.backbones.vision import join
from mmicl_core.data.collate import pack
from mmicl_core.data.names import SYLLABLES
from mmicl_core.prompts import Turn
from tests.fakes import draw_picture

QUESTION = "This is"
BEFORE, PICTURE = slice(0, 2), slice(2, 5)
FOLLOWED = slice(0, 4)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw_picture(number) for number in range(40)]


@pytest.fixture(scope="module")
def nano(pictures: Sequence[Image.Image]) -> HuggingFaceBackbone:
    backbone = build_nano(["cat face", "banana"], [*SYLLABLES, QUESTION])
    start_projector(backbone, pictures, seed=0)
    return backbone


def _attention(nano: HuggingFaceBackbone, ids: list[int], layer: int) -> torch.Tensor:
    """Attention from the last token, (heads, tokens)."""
    nano.model.set_attn_implementation("eager")
    embeds_BLD = nano.model.get_input_embeddings()(torch.tensor([ids]))
    with torch.no_grad():
        output = nano.language_model(inputs_embeds=embeds_BLD, output_attentions=True)
    attention: torch.Tensor = output.attentions[layer][0, :, -1]
    return attention


def _logits(
    nano: HuggingFaceBackbone, pictures: Sequence[Image.Image], answers: Sequence[str | None]
) -> torch.Tensor:
    turns = [Turn((str(number),), QUESTION, answer) for number, answer in enumerate(answers)]
    prepared = nano.prepare(pictures)
    packed = pack([nano.chat.conversation(turns)], pictures=prepared, padding_id=0)
    with torch.no_grad():
        prompt = nano.embed(packed, nano.see(join(prepared)))
        return nano.logits(nano.read(prompt).last_hidden_state[0, -1])


def test_visual_tokens_begin_as_long_as_words_and_in_the_same_directions(
    nano: HuggingFaceBackbone, pictures: Sequence[Image.Image]
) -> None:
    with torch.no_grad():
        tokens = nano.see(join(nano.prepare(pictures)))
    assert tokens is not None
    words = nano.language_model.get_input_embeddings().weight.detach()
    lengths = [rows.square().sum(1).mean().sqrt() for rows in (tokens, words)]
    torch.testing.assert_close(*lengths, rtol=0.05, atol=0)
    _, sizes, directions = torch.linalg.svd(words, full_matrices=False)
    spanned = directions[sizes > 1e-3 * sizes[0]]
    assert len(spanned) < words.shape[1] / 2
    torch.testing.assert_close(tokens @ spanned.T @ spanned, tokens, rtol=0, atol=1e-4)


def test_first_layer_begins_by_looking_back_whatever_it_reads(nano: HuggingFaceBackbone) -> None:
    ids = torch.randint(280, 320, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    looks = _attention(nano, ids, 0).flip(1)
    assert (looks[BEFORE].argmax(1) == 1).all()
    # A picture of 25 tokens with a question of three after it.
    assert (looks[PICTURE, 3:30].sum(1) > 0.9).all()
    assert (looks[PICTURE].amax(1) < 0.15).all()


def test_second_layer_begins_by_finding_what_followed_a_token_before(nano: HuggingFaceBackbone) -> None:
    words = list(range(280, 320))
    found = [
        _attention(nano, [*words, words[number]], 1)[FOLLOWED, number + 1].mean() for number in range(5, 35)
    ]
    assert float(torch.stack(found).mean()) > 10 / len(words)


def test_untrained_model_names_a_picture_as_it_was_named_before(
    nano: HuggingFaceBackbone, pictures: Sequence[Image.Image]
) -> None:
    names = ["bako", "mute"]
    first = [nano.tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in names]
    right = 0
    pairs = list(pairwise(pictures[:21]))
    for pair in pairs:
        for asked in (0, 1):
            logits = _logits(nano, [*pair, pair[asked]], [*names, None])
            right += bool(logits[first[asked]] > logits[first[1 - asked]])
    # Even through a tower that has learned nothing; by chance it is half of them.
    assert right >= 0.7 * 2 * len(pairs)

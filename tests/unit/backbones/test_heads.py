from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from mmicl_core.backbones.decoding import Decoding
from mmicl_core.backbones.heads import Heads
from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.backbones.vision import join
from mmicl_core.data.collate import pack
from mmicl_core.errors import BackboneError
from mmicl_core.prompts import Turn
from tests.fakes import draw_picture, tiny_backbone
from tests.families import NAMES, write_model

# 32-bit sums in another order differ in the last bits; scores and activations are of the order of 1.
LAST_BITS = {"atol": 2e-5, "rtol": 1e-4}
LONG, SHORT = "What is this then?", "What?"


@cache
def _backbone(name):
    with tempfile.TemporaryDirectory() as folder:
        write_model(name, Path(folder))
        return load_backbone(Path(folder))


def _prompts(backbone, *turns, side="left"):
    """One prompt for each turn, with its pictures as numbers of drawings, and how it was packed."""
    prepared = [backbone.prepare([draw_picture(int(key))])[0] for turn in turns for key in turn.pictures]
    prompts = [backbone.chat.conversation([turn]) for turn in turns]
    padding = backbone.tokenizer.pad_token_id
    packed = pack(prompts, pictures=prepared, padding_id=padding, side=side)
    questions = [turn.question for turn in turns for _ in turn.pictures]
    return backbone.embed(packed, backbone.see(join(prepared, questions))), packed


def _ask(picture, question=LONG, answer=None):
    return Turn((str(picture),), question, answer, scored=answer is not None)


def _values(heads, backbone, prompts):
    with heads.read(prompts) as seen:
        Decoding(backbone, prompts)
    return torch.stack(seen, 1)


@pytest.mark.parametrize("name", NAMES)
def test_values_of_one_prompt_in_all_heads_give_its_scores_to_another(name):
    backbone = _backbone(name)
    heads = Heads(backbone)
    (one, _), (other, _) = _prompts(backbone, _ask(0)), _prompts(backbone, _ask(1))
    scores, own = Decoding(backbone, one).scores_BV, Decoding(backbone, other).scores_BV
    with heads.replace(other, _values(heads, backbone, one)[0], torch.ones(heads.shape[:2])):
        replaced = Decoding(backbone, other).scores_BV
    # The pictures are different, and nothing but heads carries them to the last token.
    assert (scores - own).abs().max() > 1e-2
    torch.testing.assert_close(replaced, scores, **LAST_BITS)


def test_heads_are_replaced_where_they_are_chosen_in_each_prompt_and_nowhere_else():
    backbone = tiny_backbone()
    heads = Heads(backbone)
    prompts, _ = _prompts(backbone, _ask(0), _ask(1, SHORT))
    own = _values(heads, backbone, prompts)
    values = torch.randn(heads.shape, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 1]]])
    with heads.replace(prompts, values, chosen):
        changed = _values(heads, backbone, prompts)
    assert torch.equal(changed[0, 0, 0], values[0, 0])
    assert torch.equal(changed[1, 1, 1], values[1, 1])
    # The first prompt's second layer reads what its first gave, all else is as it was.
    assert torch.equal(changed[0, 0, 1], own[0, 0, 1])
    assert torch.equal(changed[1, 0], own[1, 0])
    assert torch.equal(changed[1, 1, 0], own[1, 1, 0])
    assert not torch.equal(changed[0, 1], own[0, 1])


@pytest.mark.parametrize("name", ["llava", "blip_2_t5"])
def test_no_head_chosen_leaves_every_score_as_it_is(name):
    backbone = _backbone(name)
    heads = Heads(backbone)
    prompts, packed = _prompts(backbone, _ask(0, answer="red"), _ask(1, SHORT, "blue"), side="right")
    plain = backbone.answer_nll(prompts, packed)
    with heads.replace(prompts, torch.ones(heads.shape), torch.zeros(heads.shape[:2])):
        assert torch.equal(backbone.answer_nll(prompts, packed), plain)


@pytest.mark.parametrize("name", ["llava", "paligemma", "blip_2_t5"])
def test_prompts_are_read_at_their_last_token_whatever_pads_or_follows_it(name):
    backbone = _backbone(name)
    heads = Heads(backbone)
    alone = [_values(heads, backbone, _prompts(backbone, turn)[0]) for turn in (_ask(0), _ask(1, SHORT))]
    padded = _values(heads, backbone, _prompts(backbone, _ask(0), _ask(1, SHORT))[0])
    answered, packed = _prompts(backbone, _ask(0, answer="red"), _ask(1, SHORT, "blue cup"), side="right")
    with heads.read(answered) as seen:
        backbone.answer_nll(answered, packed)
    torch.testing.assert_close(padded, torch.cat(alone), **LAST_BITS)
    torch.testing.assert_close(torch.stack(seen, 1), torch.cat(alone), **LAST_BITS)


@pytest.mark.parametrize("name", ["llava", "blip_2_t5"])
def test_tokens_after_the_prompt_are_decoded_without_replacing(name):
    backbone = _backbone(name)
    heads = Heads(backbone)
    prompts, _ = _prompts(backbone, _ask(0))
    values, chosen = torch.randn(heads.shape), torch.ones(heads.shape[:2])
    token = torch.tensor([20])
    with heads.replace(prompts, values, chosen):
        inside = Decoding(backbone, prompts)
        inside.feed(token)
    with heads.replace(prompts, values, chosen):
        outside = Decoding(backbone, prompts)
    outside.feed(token)
    assert torch.equal(inside.scores_BV, outside.scores_BV)


def test_model_is_as_before_when_the_pass_inside_fails_or_never_comes():
    backbone = tiny_backbone()
    heads = Heads(backbone)
    prompts, _ = _prompts(backbone, _ask(0))
    plain = Decoding(backbone, prompts).scores_BV
    with pytest.raises(RuntimeError), heads.replace(prompts, torch.ones(heads.shape), torch.ones(2, 2)):
        raise RuntimeError
    assert torch.equal(Decoding(backbone, prompts).scores_BV, plain)


def test_projection_that_the_heads_cannot_share_is_refused_with_its_width():
    backbone = tiny_backbone()
    backbone.layers[1].self_attn.o_proj = nn.Linear(33, 32)
    with pytest.raises(BackboneError, match=r"self_attn\.o_proj takes \[32, 33\] channels.* 2 heads"):
        Heads(backbone)

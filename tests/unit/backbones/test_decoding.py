from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmicl_core.backbones.decoding import context_length, generate, greedy_tokens
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.data.collate import pack
from mmicl_core.prompts import Piece
from tests.fakes import tiny_backbone

NEW_TOKENS = 12


def prompt(backbone: HuggingFaceBackbone, seed: int) -> Embedded:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 200, (9,), generator=generator).tolist()
    return backbone.embed(pack([[Piece("text", ids=tuple(ids))]], padding_id=0))


@pytest.mark.parametrize("seed", range(4))
def test_tokens_one_by_one_are_those_of_generate(seed):
    backbone = tiny_backbone(seed)
    whole = generate(backbone, prompt(backbone, seed), NEW_TOKENS)[0]
    assert list(greedy_tokens(backbone, prompt(backbone, seed), NEW_TOKENS)) == whole


def test_tokens_stop_before_the_end_token(monkeypatch):
    backbone = tiny_backbone()
    free = list(greedy_tokens(backbone, prompt(backbone, seed=0), NEW_TOKENS))
    end = free[-1]
    monkeypatch.setattr(type(backbone), "tokenizer", SimpleNamespace(eos_token_id=end))
    cut = free[: free.index(end)]
    assert list(greedy_tokens(backbone, prompt(backbone, seed=0), NEW_TOKENS)) == cut
    assert generate(backbone, prompt(backbone, seed=0), NEW_TOKENS) == [cut]


@pytest.mark.parametrize("most", [1, 5])
def test_answer_is_cut_at_the_limit(most):
    backbone = tiny_backbone()
    whole = generate(backbone, prompt(backbone, seed=0), NEW_TOKENS)[0]
    assert generate(backbone, prompt(backbone, seed=0), most) == [whole[:most]]
    assert list(greedy_tokens(backbone, prompt(backbone, seed=0), most)) == whole[:most]


def test_context_is_as_long_as_the_language_model_says():
    backbone = tiny_backbone()
    assert context_length(backbone) == backbone.model.config.text_config.max_position_embeddings == 2048

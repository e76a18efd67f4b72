from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmicl_core.backbones.decoding import greedy_tokens
from tests.fakes import tiny_backbone

NEW_TOKENS = 12


def prompt(backbone, seed):
    generator = torch.Generator().manual_seed(seed)
    return backbone.embed(torch.randint(10, 200, (1, 9), generator=generator))


@pytest.mark.parametrize("seed", range(4))
def test_tokens_one_by_one_are_those_of_generate(seed):
    backbone = tiny_backbone(seed)
    embeds_BLD = prompt(backbone, seed)
    whole = backbone.generate(embeds_BLD, torch.ones(1, 9, dtype=torch.long), NEW_TOKENS)[0]
    assert list(greedy_tokens(backbone, embeds_BLD[0], NEW_TOKENS)) == whole


def test_tokens_stop_before_the_end_token(monkeypatch):
    backbone = tiny_backbone()
    embeds_LD = prompt(backbone, seed=0)[0]
    free = list(greedy_tokens(backbone, embeds_LD, NEW_TOKENS))
    end = free[-1]
    monkeypatch.setattr(type(backbone), "tokenizer", SimpleNamespace(eos_token_id=end))
    assert list(greedy_tokens(backbone, embeds_LD, NEW_TOKENS)) == free[: free.index(end)]

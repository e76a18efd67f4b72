from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmicl_core.backbones.decoding import (
    Decoding,
    context_length,
    generate,
    generate_by_beams,
    greedy_tokens,
)
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.data.collate import pack
from mmicl_core.prompts import Piece
from tests.fakes import tiny_backbone

NEW_TOKENS = 12
NEVER = -1


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


def prompts_of(backbone: HuggingFaceBackbone, seed: int, lengths: tuple[int, ...]) -> Embedded:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(10, 200, (length,), generator=generator).tolist() for length in lengths]
    pieces = [[Piece("text", ids=tuple(one))] for one in ids]
    return backbone.embed(pack(pieces, padding_id=0, side="left"))


def ended_by(backbone: HuggingFaceBackbone, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backbone), "tokenizer", SimpleNamespace(eos_token_id=token))


def test_answers_of_a_batch_are_those_of_each_alone_whenever_they_end(monkeypatch):
    fewer_grew_on = 0
    for seed in range(4):
        backbone, lengths = tiny_backbone(seed), (9, 4, 7, 5, 9, 3)
        ended_by(backbone, NEVER, monkeypatch)
        free = generate(backbone, prompts_of(backbone, seed, lengths), NEW_TOKENS)
        for end in {token for answer in free for token in answer}:
            ended_by(backbone, end, monkeypatch)
            together = generate(backbone, prompts_of(backbone, seed, lengths), NEW_TOKENS)
            assert together == [answer[: answer.index(end)] if end in answer else answer for answer in free]
            fewer_grew_on += 0 < sum(end not in answer for answer in free) <= len(free) // 2
    assert fewer_grew_on > 1


def test_rows_that_ended_are_no_longer_computed(monkeypatch):
    backbone = tiny_backbone()
    free = generate(backbone, prompts_of(backbone, 0, (9, 4, 7, 5)), NEW_TOKENS)
    ended_by(backbone, free[0][0], monkeypatch)
    rows = list[int]()
    fed = Decoding.feed
    monkeypatch.setattr(Decoding, "feed", lambda self, ids_B: (rows.append(len(ids_B)), fed(self, ids_B))[1])
    answers = generate(backbone, prompts_of(backbone, 0, (9, 4, 7, 5)), NEW_TOKENS)
    alive = [sum(len(answer) > step for answer in answers) for step in range(len(rows))]
    assert rows[0] <= 4
    assert all(
        computed < 2 * living or computed == living for computed, living in zip(rows, alive, strict=True)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("beams", [2, 3])
def test_beams_find_what_those_of_transformers_find(seed, beams, monkeypatch):
    backbone, lengths = tiny_backbone(seed), (9, 4, 7)
    end = generate(backbone, prompts_of(backbone, seed, lengths), NEW_TOKENS)[0][3]
    ended_by(backbone, end, monkeypatch)
    prompts = prompts_of(backbone, seed, lengths)
    found = generate_by_beams(backbone, prompts, NEW_TOKENS, beams)
    expected = backbone.model.generate(
        inputs_embeds=prompts.embeds_BLD,
        attention_mask=prompts.mask_BL,
        max_new_tokens=NEW_TOKENS,
        num_beams=beams,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    ).tolist()
    assert found == [ids[: ids.index(end)] if end in ids else ids[:NEW_TOKENS] for ids in expected]


def test_one_beam_is_greedy():
    backbone = tiny_backbone()
    prompts = prompts_of(backbone, 0, (9, 4))
    assert generate_by_beams(backbone, prompts, NEW_TOKENS, 1) == generate(backbone, prompts, NEW_TOKENS)

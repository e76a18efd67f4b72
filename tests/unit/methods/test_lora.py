from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmicl_core.config.model import LoraConfig, PromptTuningConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods import build_method
from mmicl_core.methods.base import Plain
from tests.fakes import random_pictures, tiny_backbone
from tests.methods import batch_rows


def test_updates_stand_beside_every_matrix_of_the_language_model_and_of_nothing_else() -> None:
    backbone = tiny_backbone()
    expected = sum(
        2 * (layer.in_features + layer.out_features)
        for layer in backbone.language_model.modules()
        if isinstance(layer, nn.Linear)
    )
    method = build_method(backbone, LoraConfig(rank=2))
    assert sum(parameter.numel() for parameter in method.trainable().values()) == expected
    assert all("language_model" in name and "lora_" in name for name in method.trainable())


def test_model_with_fresh_updates_says_what_it_said_before() -> None:
    backbone = tiny_backbone()
    pictures = random_pictures("abcd", backbone)
    with torch.no_grad():
        before = Plain(backbone)(Plain(backbone).collate(batch_rows(), pictures, None))
        method = build_method(backbone, LoraConfig(rank=2))
        after = method(method.collate(batch_rows(), pictures, None))
    assert torch.equal(before, after)


def test_targets_are_the_matrices_of_these_names_and_a_name_that_none_has_is_refused() -> None:
    method = build_method(tiny_backbone(), LoraConfig(targets=("q_proj",)))
    assert len(method.trainable()) == 2 * 2
    with pytest.raises(ConfigError, match=r"names 'w_pack', the language model's matrices are \['down_proj'"):
        build_method(tiny_backbone(), LoraConfig(targets=("w_pack",)))


def test_soft_tokens_of_real_words_before_a_prompt_are_these_words() -> None:
    backbone = tiny_backbone()
    method = build_method(backbone, PromptTuningConfig(tokens=3))
    words = backbone.model.get_input_embeddings().weight
    assert _among(method.soft_tokens.embedding.weight, words).all()
    method = build_method(backbone, PromptTuningConfig(tokens=3, initial="random"))
    assert not _among(method.soft_tokens.embedding.weight, words).any()


def _among(rows: Tensor, words: Tensor) -> Tensor:
    return (rows[:, None] == words).all(-1).any(1)

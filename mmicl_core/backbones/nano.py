"""`nano`: a small, stock LLaVA for two CPU cores, built from nothing.

CLIP vision tower + two-layer projector + Llama, a byte-pair tokenizer of its own and the shortest
chat template that tells question from answer:

    <s> <image> This is <answer> bako </s> <image> This is <answer> mute </s> <image> This is <answer>

A picture is 5 x 5 patches of 14 pixels. It is drawn at 72 px in the embedded corpus and read at 70,
so that the grid is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.induction import HEADS, WIDTH, start_language_model
from mmicl_core.backbones.vision import join

__all__ = ["build_nano", "whiten_patches"]

IMAGE_PIXELS = 70
PATCH_PIXELS = 14
VOCABULARY = 2048
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<answer>")
LONGEST_PROMPT = 2048
# Often enough that their merges come before those of any word of a corpus.
FREQUENT_REPEATS = 5000
PATCH_SCALE = 0.05
WHITENING_FLOOR = 0.05
POSITION_SCALE = 0.3
# Slow enough that half of the rotations hardly turn within a prompt.
ROPE_THETA = 1.0e6
SLOWEST_TURN = 20.0

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<answer>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def build_nano(texts: Iterable[str], frequent: Sequence[str], seed: int = 0) -> HuggingFaceBackbone:
    """An untrained nano.

    Args:
        texts: what the tokenizer is trained on.
        frequent: words and parts of words that shall each become one token.
        seed: draws the weights.
    """
    tokenizer = _train_tokenizer(texts, frequent)
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_PIXELS,
            patch_size=PATCH_PIXELS,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=LONGEST_PROMPT,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=SPECIAL_TOKENS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_PIXELS},
            crop_size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    backbone = HuggingFaceBackbone(LlavaForConditionalGeneration(config), processor, identity="new")
    _set_positions(backbone)
    start_language_model(backbone, SPECIAL_TOKENS.index("<answer>"), seed)
    return backbone


@torch.no_grad()
def whiten_patches(backbone: HuggingFaceBackbone, pictures: Sequence[Image.Image]) -> None:
    """Start the patch embedding as the pictures' principal components, equally spread and mixed.

    Pixels of a patch are nearly the same everywhere; an embedding that spreads what differs between
    patches spares the tower the first passes (whitening as in Page, "How to train your ResNet 8", 2018).
    """
    layer = backbone.vision_tower.embeddings.patch_embedding
    pixels = join(backbone.prepare(pictures)).inputs["pixel_values"]
    patches = pixels.unfold(2, PATCH_PIXELS, PATCH_PIXELS).unfold(3, PATCH_PIXELS, PATCH_PIXELS)
    rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, layer.weight[0].numel())
    _, spread, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    spread = spread / len(rows) ** 0.5
    width = len(layer.weight)
    whitened = directions[:width] / (spread[:width, None] + WHITENING_FLOOR * spread[0])
    mixing, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    layer.weight.copy_((PATCH_SCALE * mixing @ whitened).reshape(layer.weight.shape))


@torch.no_grad()
def _set_positions(backbone: HuggingFaceBackbone) -> None:
    """Start the position embeddings as sines of row and column, so that neighbours begin alike."""
    table = backbone.vision_tower.embeddings.position_embedding.weight
    side, quarter = IMAGE_PIXELS // PATCH_PIXELS, table.shape[1] // 4
    angles = torch.arange(side)[:, None] / SLOWEST_TURN ** (torch.arange(quarter) / quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    # The class token, which nobody reads, keeps position 0.
    table[1:] = POSITION_SCALE * torch.cat([rows, columns], dim=2).reshape(side * side, -1)


def _train_tokenizer(texts: Iterable[str], frequent: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Parts of words come before words: a merge inside a question must not split a syllable of a name.
    repeated = (text for text in frequent for _ in range(FREQUENT_REPEATS // (8 if " " in text else 1)))
    tokenizer.train_from_iterator(chain(sorted(set(texts)), repeated), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LONGEST_PROMPT,
        extra_special_tokens={"image_token": "<image>", "answer_token": "<answer>"},
    )

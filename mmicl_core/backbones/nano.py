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
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
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

__all__ = ["balance_projector", "build_nano", "whiten_patches"]

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
EMBEDDING_SPREAD = 0.1
# Slow enough that half of the rotations hardly turn within a prompt.
ROPE_THETA = 1.0e6
# Tokens that the heads of the first layer look back: the one before, a short answer, a picture's middle.
LOOK_BACK = (1, 1, 2, 4, 8, 16, 16, 24)
LOOK_STRENGTH = 45.0
# Heads of the first layer that heads of the second start from, two each: those that find what followed a
# token before, and those that find where a like picture was looked back at.
REPEATING, LIKENING = (0, 0, 1, 1), (5, 5, 6, 6)
MATCH_STRENGTH = 1.5
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
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
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
    _set_language_model(backbone, torch.Generator().manual_seed(seed))
    return backbone


@torch.no_grad()
def whiten_patches(backbone: HuggingFaceBackbone, pictures: Sequence[Image.Image]) -> None:
    """Start the patch embedding as the pictures' principal components, equally spread and mixed.

    Pixels of a patch are nearly the same everywhere; an embedding that spreads what differs between
    patches spares the tower the first passes (whitening as in Page, "How to train your ResNet 8", 2018).
    """
    layer = backbone.vision_tower.embeddings.patch_embedding
    pixels = backbone.pixels(pictures)
    patches = pixels.unfold(2, PATCH_PIXELS, PATCH_PIXELS).unfold(3, PATCH_PIXELS, PATCH_PIXELS)
    rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, layer.weight[0].numel())
    _, spread, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    spread = spread / len(rows) ** 0.5
    width = len(layer.weight)
    whitened = directions[:width] / (spread[:width, None] + WHITENING_FLOOR * spread[0])
    mixing, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    layer.weight.copy_((PATCH_SCALE * mixing @ whitened).reshape(layer.weight.shape))


@torch.no_grad()
def balance_projector(backbone: HuggingFaceBackbone, pictures: Sequence[Image.Image]) -> None:
    """Start the projector so that visual tokens lie around the words' mean and spread like them.

    By default their spread is 28 times that of the words.
    """
    vision_NVW = backbone.encode_pixels(backbone.pixels(pictures))
    first, second = backbone.projector.linear_1, backbone.projector.linear_2
    mean = vision_NVW.mean((0, 1))
    nn.init.orthogonal_(first.weight, generator=torch.Generator().manual_seed(1))
    first.weight.div_((vision_NVW - mean).square().mean().sqrt())
    first.bias.copy_(-first.weight @ mean)
    nn.init.orthogonal_(second.weight, generator=torch.Generator().manual_seed(2))
    nn.init.zeros_(second.bias)
    tokens = backbone.project(vision_NVW)
    second.weight.mul_(EMBEDDING_SPREAD / (tokens - tokens.mean((0, 1))).square().mean().sqrt())
    words = backbone.language_model.get_input_embeddings().weight
    second.bias.copy_(words.mean(0) - backbone.project(vision_NVW).mean((0, 1)))


@torch.no_grad()
def _set_language_model(backbone: HuggingFaceBackbone, generator: torch.Generator) -> None:
    """Start with words that stand out, heads that look back, heads that match, and blocks that add nothing.

    Repeating a name, and telling which one a picture had, both need a head that carries what stood before
    a token and a head that finds it again (induction heads, Olsson et al. 2022, arXiv:2209.11895). Left to
    chance, 45,000 episodes of names alone did not bring the two together; begun as such (compare mimetic
    initialisation, Trockman and Kolter 2023, arXiv:2305.09828), 10,000 do.
    """
    language_model = backbone.language_model
    words = language_model.get_input_embeddings().weight
    words.mul_(EMBEDDING_SPREAD / words.std())
    shared = torch.randn(words.shape[1], generator=generator)
    words.add_(EMBEDDING_SPREAD * shared / shared.square().mean().sqrt())
    for layer in language_model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    first, second = (layer.self_attn for layer in language_model.layers[:2])
    nn.init.orthogonal_(first.v_proj.weight, generator=generator)
    nn.init.orthogonal_(first.o_proj.weight, generator=generator)
    first.o_proj.weight.mul_(EMBEDDING_SPREAD)
    rates = language_model.rotary_emb.inv_freq
    for head, distance in enumerate(LOOK_BACK):
        _look_back(first, head, distance, shared, rates)
    for head, before in enumerate((*REPEATING, *LIKENING)):
        rows = _rows_of(first, before)
        seen = first.o_proj.weight[:, rows].T / EMBEDDING_SPREAD
        _match(second, head, first.v_proj.weight[rows] if head < len(REPEATING) else seen, seen)


def _look_back(attention: Any, head: int, distance: int, shared: Tensor, rates: Tensor) -> None:
    """Make a head attend to what stands `distance` before a token, by its rotary position alone.

    Queries and keys are read off the component that all embeddings share; the rotations nearest to the
    distance weigh most, so that a far look is a wide one.
    """
    weights = LOOK_STRENGTH * torch.exp(-torch.log(rates * distance).abs())
    key = torch.cat([weights.sqrt(), torch.zeros_like(weights)])
    turned = [weights.sqrt() * torch.cos(rates * distance), -weights.sqrt() * torch.sin(rates * distance)]
    # Normalised, half of an embedding's square is the shared component.
    reader = shared / shared.norm() / (len(shared) / 2) ** 0.5
    rows = _rows_of(attention, head)
    attention.q_proj.weight[rows] += torch.outer(torch.cat(turned), reader)
    attention.k_proj.weight[rows] += torch.outer(key, reader)


def _match(attention: Any, head: int, asked: Tensor, seen: Tensor) -> None:
    """Make a head find tokens whose reading by `seen` is like this one's by `asked`, both (head_dim, D).

    Only in the slow rotations, which distance leaves alone.
    """
    rows = _rows_of(attention, head)
    half = attention.head_dim // 2
    slow = (torch.arange(2 * half) % half >= half // 2)[:, None]
    attention.q_proj.weight[rows] += MATCH_STRENGTH * asked * slow
    attention.k_proj.weight[rows] += MATCH_STRENGTH * seen * slow


def _rows_of(attention: Any, head: int) -> slice:
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


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

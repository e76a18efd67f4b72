"""What tiny models are put together from: tokenizers, chat templates, and the configuration of each family.

A family's function takes the width of its language model and its tokenizer. No language model is as wide as
the vision tower before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SIDE = 28
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
QUERIES = 5
# Locations and segments, which the processor of PaliGemma adds to any tokenizer.
PLACES = 1024 + 128

SENTENCES = (
    "This is a red cat and that is a blue cup.",
    "What do you see in the picture? Answer with one word.",
    "You are a helpful assistant. A chat between a curious user and an assistant.",
    "Question: what colour is it? Answer: green, grey, yellow, white, black.",
)
MERGES = 64
# Of weights in 32 channels, so that what goes in decides what comes out.
SPREAD = 0.15


def make_tokenizer(named: Mapping[str, str], others: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `named` are special tokens by their attribute, `others` have none."""
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    special = list(dict.fromkeys([*named.values(), *others]))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(bytes_) + MERGES,
        special_tokens=special,
        initial_alphabet=bytes_,
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=list(others), **named)


def make_question_tokenizer() -> PreTrainedTokenizerFast:
    """The second tokenizer of InstructBLIP, whose texts begin and end as those of BERT."""
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = make_tokenizer(named)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return tokenizer


def chat_template(
    *, user: str, image: str, user_end: str, assistant: str, assistant_end: str, prefix: str = ""
) -> str:
    """Jinja: the prefix once, then what stands around what either side says."""

    def write(literal: str) -> str:
        return "{{ " + json.dumps(literal) + " }}"

    parts = (
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + write(image)
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    )
    said = "{% if message['content'] is string %}{{ message['content'] }}{% else %}" + parts + "{% endif %}"
    return (
        write(prefix)
        + "{% for message in messages %}{% if message['role'] == 'user' %}"
        + (write(user) + said + write(user_end))
        + "{% else %}"
        + (write(assistant) + said + write(assistant_end))
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + write(assistant)
        + "{% endif %}"
    )


def _tokens(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def text(model_type: str, size: int, tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Configuration of a language model of the Llama kind, two layers with grouped attention."""
    return {
        "model_type": model_type,
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        **_tokens(tokenizer),
        **more,
    }


def opt(size: int, tokenizer: Any) -> dict[str, Any]:
    """Configuration of a language model that learnt its positions."""
    return {
        "model_type": "opt",
        "hidden_size": size,
        "word_embed_proj_dim": size,
        "ffn_dim": 2 * size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "dropout": 0.0,
        **_tokens(tokenizer),
    }


def t5(size: int, tokenizer: Any) -> dict[str, Any]:
    """Configuration of an encoder and a decoder, two layers each."""
    return {
        "model_type": "t5",
        "d_model": size,
        "d_kv": size // 4,
        "d_ff": 2 * size,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": tokenizer.pad_token_id,
        **_tokens(tokenizer),
    }


def vision(model_type: str, **more: Any) -> dict[str, Any]:
    """Configuration of a tower of three layers that cuts 28 pixels into four by four patches."""
    return {
        "model_type": model_type,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
        **more,
    }


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def llava(size: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "vision_config": vision("clip_vision_model"),
        "text_config": text("llama", size, tokenizer),
        "image_token_index": _id(tokenizer, "<image>"),
        "image_seq_length": 16,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def llava_next(size: int, tokenizer: Any) -> dict[str, Any]:
    return llava(size, tokenizer) | {
        "text_config": text("mistral", size, tokenizer, sliding_window=None),
        "image_grid_pinpoints": PINPOINTS,
    }


def llava_onevision(size: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "vision_config": vision("siglip_vision_model", vision_use_head=False),
        "text_config": text("qwen2", size, tokenizer),
        "image_token_index": _id(tokenizer, "<image>"),
        "video_token_index": _id(tokenizer, "<video>"),
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _qwen(size: int, tokenizer: Any, version: str, tower: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    # A head's frequencies are shared out among time, height and width.
    frequencies = size // 4 // 2
    side = frequencies // 4
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [frequencies - 2 * side, side, side],
    }
    return {
        "vision_config": {
            "model_type": f"{version}_vision",
            "depth": 3,
            "num_heads": 3,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **tower,
        },
        "text_config": text(f"{version}_text", size, tokenizer, rope_parameters=rope, **more),
        "image_token_id": _id(tokenizer, "<|image_pad|>"),
        "video_token_id": _id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _id(tokenizer, "<|vision_end|>"),
    }


def qwen2_vl(size: int, tokenizer: Any) -> dict[str, Any]:
    return _qwen(size, tokenizer, "qwen2_vl", {"embed_dim": 24, "mlp_ratio": 2, "hidden_size": size})


def qwen2_5_vl(size: int, tokenizer: Any) -> dict[str, Any]:
    # Windows of two by two merged patches.
    windows = {"window_size": 28, "fullatt_block_indexes": [1]}
    widths = {"hidden_size": 24, "intermediate_size": 48, "out_hidden_size": size}
    return _qwen(size, tokenizer, "qwen2_5_vl", widths | windows)


def qwen3_vl(size: int, tokenizer: Any) -> dict[str, Any]:
    widths = {"hidden_size": 24, "intermediate_size": 48, "out_hidden_size": size}
    tower = widths | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = _qwen(size, tokenizer, "qwen3_vl", tower, head_dim=size // 4, num_hidden_layers=3)
    config["text_config"]["rope_parameters"]["mrope_interleaved"] = True
    return config


def internvl(size: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "vision_config": vision("internvl_vision"),
        "text_config": text("qwen2", size, tokenizer),
        "image_token_id": _id(tokenizer, "<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "tie_word_embeddings": False,
    }


def idefics2(size: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "vision_config": vision("idefics2_vision", image_size=2 * SIDE),
        "perceiver_config": {
            "model_type": "idefics2_perceiver",
            "hidden_size": size,
            "resampler_n_latents": QUERIES,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": size // 4,
            "num_key_value_heads": 2,
        },
        "text_config": text("mistral", size, tokenizer, sliding_window=None),
        "image_token_id": _id(tokenizer, "<image>"),
    }


def idefics3(size: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "vision_config": vision("idefics3_vision"),
        "text_config": text("llama", size, tokenizer),
        "image_token_id": _id(tokenizer, "<image>"),
        "scale_factor": 2,
    }


def smolvlm(size: int, tokenizer: Any) -> dict[str, Any]:
    return idefics3(size, tokenizer) | {"vision_config": vision("smolvlm_vision")}


def paligemma(size: int, tokenizer: Any) -> dict[str, Any]:
    vocabulary = len(tokenizer) + PLACES
    return {
        "vision_config": vision("siglip_vision_model", vision_use_head=False),
        "text_config": text("gemma", size, tokenizer, head_dim=size // 4) | {"vocab_size": vocabulary},
        "vocab_size": vocabulary,
        "hidden_size": size,
        "projection_dim": size,
        "image_token_index": _id(tokenizer, "<image>"),
    }


def gemma3(size: int, tokenizer: Any) -> dict[str, Any]:
    layers = {
        "head_dim": size // 4,
        "query_pre_attn_scalar": size // 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return {
        "vision_config": vision("siglip_vision_model", vision_use_head=False),
        "text_config": text("gemma3_text", size, tokenizer, **layers),
        "mm_tokens_per_image": 4,
        "boi_token_index": tokenizer.boi_token_id,
        "eoi_token_index": tokenizer.eoi_token_id,
        "image_token_index": tokenizer.image_token_id,
    }


def mistral3(size: int, tokenizer: Any) -> dict[str, Any]:
    return {
        "vision_config": vision("pixtral", num_attention_heads=2, image_size=2 * SIDE),
        "text_config": text("mistral", size, tokenizer, head_dim=size // 4, sliding_window=None),
        "image_token_index": _id(tokenizer, "[IMG]"),
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    }


def fast_vlm(size: int, tokenizer: Any) -> dict[str, Any]:
    return {
        # A convolutional tower, as FastViT is; that one is made by a library of its own.
        "vision_config": {
            "model_type": "mobilenet_v2",
            "image_size": 2 * SIDE,
            "depth_multiplier": 0.1,
            "first_layer_is_expansion": True,
            "finegrained_output": True,
            "tf_padding": False,
            "hidden_size": 1280,
        },
        "text_config": text("qwen2", size, tokenizer),
        "image_token_index": _id(tokenizer, "<image>"),
        "image_seq_length": 4,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def blip(language: dict[str, Any], tokenizer: Any, kind: str) -> dict[str, Any]:
    return {
        "vision_config": vision(f"{kind}_vision_model"),
        "qformer_config": {
            "model_type": f"{kind}_qformer",
            "vocab_size": len(make_question_tokenizer()),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "encoder_hidden_size": 24,
        },
        "text_config": language,
        "num_query_tokens": QUERIES,
        "image_token_index": _id(tokenizer, "<image>"),
    }


def spread_weights(model: Any, seed: int) -> None:
    """Draw all matrices anew, wider than models are begun with; norms and biases stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                even = (2 / parameter[0].numel()) ** 0.5
                # Of a convolution over few channels a smaller spread would let the signal fade.
                spread = even if parameter.ndim > 3 else min(even, SPREAD)
                parameter.normal_(0.0, spread, generator=generator)

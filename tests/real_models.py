"""The sizes of published models, as configurations: what can be counted without their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    CLIPVisionConfig,
    InstructBlipConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    Qwen2_5_VLConfig,
    T5Config,
)

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.processors import load_processor
from tests.families import write_model

__all__ = ["REAL", "outline"]

CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
}
FLAN_T5_XL = {
    "d_model": 2048,
    "d_ff": 5120,
    "d_kv": 64,
    "num_heads": 32,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# BERT's, and the mark that InstructBLIP begins a decoder with.
QFORMER_WORDS = 30523
EVA_G = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


def _llava() -> Any:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_LARGE, image_size=336), text_config=LlamaConfig(**VICUNA_7B)
    )


def _llava_next() -> Any:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP_LARGE, image_size=336), text_config=LlamaConfig(**VICUNA_7B)
    )


def _qwen() -> Any:
    # The library's defaults are the 7B model's, but for these.
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584, "depth": 32, "intermediate_size": 3420},
    )


def _instructblip() -> Any:
    return InstructBlipConfig(
        vision_config=EVA_G,
        qformer_config={"vocab_size": QFORMER_WORDS, "encoder_hidden_size": 1408},
        text_config=T5Config(**FLAN_T5_XL).to_dict(),
        image_token_index=32100,
    )


def _blip_2() -> Any:
    return Blip2Config(
        vision_config=EVA_G,
        qformer_config={"vocab_size": QFORMER_WORDS, "encoder_hidden_size": 1408},
        text_config=T5Config(**FLAN_T5_XL).to_dict(),
        image_token_index=32100,
    )


REAL: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "llava-1.5-7b-hf": ("llava", _llava),
    "llava-v1.6-vicuna-7b-hf": ("llava_next", _llava_next),
    "Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", _qwen),
    "instructblip-flan-t5-xl": ("instructblip", _instructblip),
    "blip2-flan-t5-xl": ("blip_2_t5", _blip_2),
}
"""Model -> the family whose tiny processor stands in for its own, and its configuration."""


@cache
def _processor(family: str) -> Any:
    with TemporaryDirectory() as folder:
        write_model(family, Path(folder))
        processor = load_processor(Path(folder))
    reader = getattr(processor, "qformer_tokenizer", None)
    if reader is not None:
        reader.add_tokens([f"[word {number}]" for number in range(QFORMER_WORDS - len(reader))])
    return processor


def outline(name: str) -> HuggingFaceBackbone:
    """A published model without its weights, on torch's meta device."""
    family, config = REAL[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config())
    return HuggingFaceBackbone(model, _processor(family), identity=name)

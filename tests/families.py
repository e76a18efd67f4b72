"""A tiny untrained model of every family that is known, with the processor and tokenizer of its kind.

Nothing imitates a model: each is the library's own class, only small, and what is written is a folder as
`save_pretrained` leaves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from tests import family_parts as parts
from tests.family_parts import PINPOINTS, QUERIES, SIDE, SQUARE, chat_template

__all__ = ["NAMES", "write_model"]

SEED = 0

SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT_ML = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@dataclass(frozen=True)
class Family:
    """How one model is made."""

    model_type: str
    config: Callable[[int, Any], dict[str, Any]]
    """Width of the language model, tokenizer -> the model's configuration."""
    processor: str
    pictures: str
    """Class of the image processor."""
    prepare: Mapping[str, Any]
    """Settings of the image processor."""
    named: Mapping[str, str]
    others: tuple[str, ...] = ()
    """Special tokens beside the named ones."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the processor."""
    videos: str | None = None
    """Class of the video processor."""
    template: str | None = None
    asks: bool = False
    """There is a second tokenizer, for questions to the projector."""


def _chat_ml(image: str, prefix: str = "") -> str:
    return chat_template(
        prefix=prefix,
        user="<|im_start|>user\n",
        image=image,
        user_end="<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        assistant_end="<|im_end|>\n",
    )


def _utterances(prefix: str) -> str:
    return chat_template(
        prefix=prefix,
        user="User:",
        image="<image>",
        user_end="<end_of_utterance>\n",
        assistant="Assistant:",
        assistant_end="<end_of_utterance>\n",
    )


def _clip(side: int = SIDE) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


_CLASS_TOKEN = {
    "patch_size": 7,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
_QWEN: Mapping[str, Any] = {
    "pictures": "Qwen2VLImageProcessorPil",
    "prepare": {
        "patch_size": 7,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2},
    },
    "named": CHAT_ML,
    "others": ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_TILES: Mapping[str, Any] = {
    "prepare": {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
    "settings": {"image_seq_len": 4},
}
_TILE_TOKENS = (
    *("<fake_token_around_image>", "<image>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
_BLIP: Mapping[str, Any] = {
    "pictures": "BlipImageProcessorPil",
    "prepare": {"size": SQUARE},
    "named": SENTENCE,
    "others": ("<image>",),
    "settings": {"num_query_tokens": QUERIES},
}
_BLIP_2 = {"processor": "Blip2Processor", **_BLIP}
_INSTRUCTBLIP = {"processor": "InstructBlipProcessor", "asks": True, **_BLIP}

FAMILIES: Mapping[str, Family] = {
    "llava": Family(
        "llava",
        parts.llava,
        "LlavaProcessor",
        "CLIPImageProcessorPil",
        _clip(),
        SENTENCE,
        ("<image>",),
        _CLASS_TOKEN,
        template=chat_template(
            prefix="A chat between a curious user and an assistant. ",
            user="USER: ",
            image="<image>\n",
            user_end=" ",
            assistant="ASSISTANT:",
            assistant_end="</s>",
        ),
    ),
    "llava_next": Family(
        "llava_next",
        parts.llava_next,
        "LlavaNextProcessor",
        "LlavaNextImageProcessorPil",
        {**_clip(), "image_grid_pinpoints": PINPOINTS},
        SENTENCE,
        ("<image>",),
        _CLASS_TOKEN,
        template=chat_template(
            prefix="<s>",
            user="[INST] ",
            image="<image>\n",
            user_end=" [/INST]",
            assistant="",
            assistant_end="</s>",
        ),
    ),
    "llava_onevision": Family(
        "llava_onevision",
        parts.llava_onevision,
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessorPil",
        {"size": SQUARE, "image_grid_pinpoints": PINPOINTS},
        CHAT_ML,
        ("<|im_start|>", "<image>", "<video>"),
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        videos="LlavaOnevisionVideoProcessor",
        template=_chat_ml("<image>\n"),
    ),
    "qwen2_vl": Family(
        "qwen2_vl",
        parts.qwen2_vl,
        "Qwen2VLProcessor",
        videos="Qwen2VLVideoProcessor",
        template=_chat_ml(_QWEN_IMAGE, SYSTEM),
        **_QWEN,
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        parts.qwen2_5_vl,
        "Qwen2_5_VLProcessor",
        videos="Qwen2VLVideoProcessor",
        template=_chat_ml(_QWEN_IMAGE, SYSTEM),
        **_QWEN,
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        parts.qwen3_vl,
        "Qwen3VLProcessor",
        videos="Qwen3VLVideoProcessor",
        template=_chat_ml(_QWEN_IMAGE),
        **_QWEN,
    ),
    "internvl": Family(
        "internvl",
        parts.internvl,
        "InternVLProcessor",
        "GotOcr2ImageProcessorPil",
        {"size": SQUARE, "crop_to_patches": True, "max_patches": 4},
        {
            **CHAT_ML,
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        ("<|im_start|>",),
        {"image_seq_length": 4},
        videos="InternVLVideoProcessor",
        template=_chat_ml("<IMG_CONTEXT>\n"),
    ),
    "idefics2": Family(
        "idefics2",
        parts.idefics2,
        "Idefics2Processor",
        "Idefics2ImageProcessorPil",
        {"size": {"shortest_edge": SIDE, "longest_edge": 2 * SIDE}, "do_image_splitting": False},
        SENTENCE,
        ("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        {"image_seq_len": QUERIES},
        template=_utterances("<s>"),
    ),
    "idefics3": Family(
        "idefics3",
        parts.idefics3,
        "Idefics3Processor",
        "Idefics3ImageProcessorPil",
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"},
        others=_TILE_TOKENS,
        template=_utterances("<|begin_of_text|>"),
        **_TILES,
    ),
    "smolvlm": Family(
        "smolvlm",
        parts.smolvlm,
        "SmolVLMProcessor",
        "SmolVLMImageProcessorPil",
        named={"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<pad>"},
        others=_TILE_TOKENS,
        videos="SmolVLMVideoProcessor",
        template=_utterances("<|im_start|>"),
        **_TILES,
    ),
    "paligemma": Family(
        "paligemma",
        parts.paligemma,
        "PaliGemmaProcessor",
        "SiglipImageProcessorPil",
        {"size": SQUARE, "image_seq_length": 16},
        GEMMA,
        ("<image>",),
    ),
    "gemma3": Family(
        "gemma3",
        parts.gemma3,
        "Gemma3Processor",
        "Gemma3ImageProcessorPil",
        {"size": SQUARE},
        {
            **GEMMA,
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        ("<start_of_turn>", "<end_of_turn>"),
        {"image_seq_length": 4},
        template=chat_template(
            prefix="<bos>",
            user="<start_of_turn>user\n",
            image="<start_of_image>",
            user_end="<end_of_turn>\n",
            assistant="<start_of_turn>model\n",
            assistant_end="<end_of_turn>\n",
        ),
    ),
    "mistral3": Family(
        "mistral3",
        parts.mistral3,
        "PixtralProcessor",
        "PixtralImageProcessorPil",
        {"size": {"longest_edge": 2 * SIDE}, "patch_size": {"height": 7, "width": 7}},
        SENTENCE,
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        {"patch_size": 7, "spatial_merge_size": 2},
        template=chat_template(
            prefix="<s>[SYSTEM_PROMPT]You are a helpful assistant.[/SYSTEM_PROMPT]",
            user="[INST]",
            image="[IMG]",
            user_end="[/INST]",
            assistant="",
            assistant_end="</s>",
        ),
    ),
    "fast_vlm": Family(
        "fast_vlm",
        parts.fast_vlm,
        "LlavaProcessor",
        "CLIPImageProcessorPil",
        _clip(2 * SIDE),
        CHAT_ML,
        ("<|im_start|>", "<image>"),
        {"patch_size": SIDE, "vision_feature_select_strategy": "full"},
        template=_chat_ml("<image>\n", SYSTEM),
    ),
    "instructblip": Family(
        "instructblip",
        lambda size, tokenizer: parts.blip(parts.t5(size, tokenizer), tokenizer, "instructblip"),
        **_INSTRUCTBLIP,
    ),
    "instructblip_vicuna": Family(
        "instructblip",
        lambda size, tokenizer: parts.blip(parts.text("llama", size, tokenizer), tokenizer, "instructblip"),
        **_INSTRUCTBLIP,
    ),
    "blip_2_opt": Family(
        "blip-2",
        lambda size, tokenizer: parts.blip(parts.opt(size, tokenizer), tokenizer, "blip_2"),
        **_BLIP_2,
    ),
    "blip_2_t5": Family(
        "blip-2",
        lambda size, tokenizer: parts.blip(parts.t5(size, tokenizer), tokenizer, "blip_2"),
        **_BLIP_2,
    ),
}
NAMES: tuple[str, ...] = tuple(FAMILIES)


def write_model(name: str, folder: Path, *, size: int = 32) -> None:
    """Write the model whose language model is `size` wide, the same at every call."""
    family = FAMILIES[name]
    tokenizer = parts.make_tokenizer(family.named, family.others)
    _write_processor(family, tokenizer, folder)
    config = AutoConfig.for_model(family.model_type, **family.config(size, tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = AutoModelForImageTextToText.from_config(config)
    parts.spread_weights(model, SEED)
    model.save_pretrained(folder)


def _write_processor(family: Family, tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    if family.asks:
        parts.make_question_tokenizer().save_pretrained(folder / "qformer_tokenizer")
    pictures = getattr(transformers, family.pictures)(**family.prepare)
    said = {
        "processor_class": family.processor,
        "image_processor": json.loads(pictures.to_json_string()),
        **family.settings,
    }
    if family.videos:
        said["video_processor"] = {"video_processor_type": family.videos}
    (folder / "processor_config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    if family.template:
        (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")

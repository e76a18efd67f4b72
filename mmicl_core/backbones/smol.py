"""`smol`: a stock FastVLM of 138 M parameters, put together out of two published models.

MobileNetV2 (ImageNet) + two-layer projector + SmolLM2-135M-Instruct. Both know their trade and not each
other: the projector between them is new, and has to be trained before the model can see.

    picture 224 px --MobileNetV2--> 7 x 7 states of 1280 --projector--> 49 visual tokens of 576

The language model keeps its tokenizer and what its chat template writes; both get a place for a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    MobileNetV2Model,
    PreTrainedTokenizerFast,
)

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone

__all__ = ["build_smol"]

IMAGE_PIXELS = 224
# MobileNetV2 halves both sides five times.
STATE_PIXELS = 32
STATE_WIDTH = 1280
IMAGE_TOKEN = "<image>"
# What every MobileNetV2 of ImageNet was shown.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_SPREAD = (0.229, 0.224, 0.225)
# What a configuration says of the file that it was read from: a model out of a GGUF file would not be saved
# again. And the names of labels, which nobody asks a tower for.
UNSAID = {"quantization_config", "_model_name_or_path", "dtype", "id2label", "label2id"}

# Of messages without pictures, word for word what the language model was tuned on.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_smol(language_model: Path, tower: MobileNetV2Model, seed: int) -> HuggingFaceBackbone:
    """The model with an untrained projector.

    Args:
        language_model: the GGUF file of SmolLM2, with its tokenizer.
        tower: MobileNetV2.
        seed: draws the projector.
    """
    folder, file = language_model.parent, language_model.name
    language: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    published = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer = _with_pictures(published, language.config.max_position_embeddings)
    config = _config(language.config, tower.config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = FastVlmForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(_with_row(language.model.state_dict()))
    model.generation_config = language.generation_config
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_PIXELS},
            crop_size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
            image_mean=list(IMAGE_MEAN),
            image_std=list(IMAGE_SPREAD),
        ),
        tokenizer=tokenizer,
        patch_size=STATE_PIXELS,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    return HuggingFaceBackbone(model, processor, identity="new")


def _with_pictures(published: Any, longest: int) -> PreTrainedTokenizerFast:
    """The same tokenizer with a token for a picture, and nothing said of the file that it was read from."""
    return PreTrainedTokenizerFast(
        tokenizer_object=published.backend_tokenizer,
        **published.special_tokens_map,
        model_max_length=longest,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def _config(language: Any, tower: Any, tokenizer: Any) -> FastVlmConfig:
    text = language.to_diff_dict() | {"vocab_size": len(tokenizer)}
    vision = tower.to_diff_dict() | {"hidden_size": STATE_WIDTH, "image_size": IMAGE_PIXELS}
    for told in (text, vision):
        for name in UNSAID & told.keys():
            del told[name]
    return FastVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(IMAGE_PIXELS // STATE_PIXELS) ** 2,
        tie_word_embeddings=True,
    )


def _with_row(weights: dict[str, Any]) -> dict[str, Any]:
    """The weights with a word more, the picture's: the mean of all words, so that the head, which is tied to
    them, finds it as likely as any. What stands there in a prompt is replaced by visual tokens."""
    words = weights["embed_tokens.weight"]
    return weights | {"embed_tokens.weight": torch.cat([words, words.mean(0, keepdim=True)])}

"""Where each family of Hugging Face models keeps its parts, and what else tells it from the others.

A new family is one row. Paths are followed from the top object that `AutoModelForImageTextToText` returns.
A row says more only where a family is not as most are:

    positions    `mrope` gives pictures rows and columns (Qwen-VL); most count tokens
    attends      `pictures` lets a picture see all of itself (Gemma 3), `prefix` all that comes before the
                 answer (PaliGemma); most see what came before
    visual       visual tokens by the configuration, where the processor does not write them in their place
    instructed   the projector reads the question too (InstructBLIP), so a picture has no features of its own
    decoder      the language model is the encoder of an encoder-decoder, and answers stand in the decoder
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from torch import nn

from mmicl_core.errors import BackboneError

__all__ = ["FAMILIES", "Family", "family_in", "family_of", "part", "vision_blocks_read"]


def _block_width(config: Any) -> int:
    return int(config.vision_config.hidden_size)


def _embed_width(config: Any) -> int:
    return int(config.vision_config.embed_dim)


def _vision_width(config: Any) -> int:
    return _block_width(config) * len(_layers_read(config))


def _shuffled_width(config: Any) -> int:
    return int(_vision_width(config) / config.downsample_ratio**2)


def _layers_read(config: Any) -> Sequence[int]:
    """Numbers of the vision tower's hidden states that the projector takes side by side."""
    read = getattr(config, "vision_feature_layer", -1)
    return (read,) if isinstance(read, int) else tuple(read)


def _one_row(_: Any) -> int:
    return 1


def _tower_square(config: Any) -> int:
    return int(config.vision_config.spatial_merge_size) ** 2


def _merged_square(config: Any) -> int:
    return int(config.spatial_merge_size) ** 2


def _scaled_square(config: Any) -> int:
    return int(config.scale_factor) ** 2


def _whole_grid(config: Any) -> int:
    return (int(config.vision_config.image_size) // int(config.vision_config.patch_size)) ** 2


def _nothing(config: Any) -> tuple[str, ...]:
    return ()


def _text_after_the_queries(config: Any) -> tuple[str, ...]:
    """The last layer of a Q-Former still makes text, but only its queries are taken."""
    last = f"qformer.encoder.layer.{config.qformer_config.num_hidden_layers - 1}"
    return (f"{last}.intermediate", f"{last}.output")


@dataclass(frozen=True)
class Family:
    """One model type and what the methods must know of it."""

    model_type: str
    vision_tower: str
    vision_layers: str | None
    """Under the tower, the blocks that a sequence of patches runs through; None where there is no such."""
    projector: tuple[str, ...]
    """Modules and parameters between tower and language model; the first one takes the tower's states."""
    language_model: str
    layers: str
    """Under the language model, its blocks."""
    head: str
    text_types: tuple[str, ...] = ()
    """Model types of the language model that this row is for; none means any."""
    root: str = "model"
    """What has `get_image_features`; empty for the top object."""
    image_token: str = "image_token"
    """The attribute of the processor that names a picture's place in a rendered chat template."""
    positions: Literal["counted", "mrope"] = "counted"
    attends: Literal["causal", "pictures", "prefix"] = "causal"
    visual: Callable[[Any], int] | None = None
    one_size: bool = False
    """Every picture is (3, height, width) to the tower, whatever it was."""
    instructed: bool = False
    unread: Callable[[Any], tuple[str, ...]] = _nothing
    """Modules of the projector whose output no one reads: there is nothing for them to learn."""
    decoder: str | None = None
    heads: str = "self_attn.o_proj"
    """Inside a block (of the decoder, where there is one), what takes all heads that look at the prompt."""
    tower_width: Callable[[Any], int] = _vision_width
    """Width of the states that the projector takes, by the configuration."""
    block_width: Callable[[Any], int] = _block_width
    """Width of the states inside the tower's blocks, by the configuration."""
    merges: Callable[[Any], int] | None = _one_row
    """Equal states that the projector makes one visual token of, by the configuration; None where it
    resamples, with queries of its own that look at all of a picture's states."""
    one_sequence: bool = False
    """The tower reads all pictures of a batch as one sequence, in which each sees itself alone."""
    chat_template: str | None = None
    """How turns are written where the processor has no template of its own."""

    @property
    def language_side(self) -> str:
        """The language model, of an encoder-decoder with its decoder; the head may be in it."""
        return self.language_model if self.root else self.language_model.rpartition(".")[0]

    @property
    def roles(self) -> Mapping[str, tuple[str, ...]]:
        """Where each role lies; what lies inside two of them belongs to the one that is named first."""
        return {
            "projector": self.projector,
            "head": (self.head,),
            "vision_tower": (self.vision_tower,),
            "language_model": (self.language_side,),
        }


# Question and answer as BLIP-2 was shown them (Li et al. 2023, arXiv:2301.12597, section 4).
BLIP_TEMPLATE = (
    "{% for message in messages %}{% set user = message['role'] == 'user' %}"
    "{% if not user %} {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ 'Question: ' + part['text'] + ' Answer:' if user else part['text'] }}{% endif %}"
    "{% endfor %}{% if not user %}</s>{% endif %}{% endfor %}"
)
# Pictures, <bos>, the question, a line feed; the answer ends in <eos> (arXiv:2407.07726, section 3.2).
PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}{% set user = message['role'] == 'user' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% if user %}<bos>{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\\n' if user else '<eos>' }}{% endfor %}"
)
PROJECTOR = "model.multi_modal_projector"
CROSS = "layer.1.EncDecAttention.o"


def _llava(model_type: str, layers: str | None, **more: Any) -> Family:
    """The arrangement that LLaVA began and most followed."""
    return Family(
        model_type,
        vision_tower="model.vision_tower",
        vision_layers=layers,
        projector=more.pop("projector", (PROJECTOR,)),
        language_model="model.language_model",
        layers="layers",
        head="lm_head",
        **more,
    )


def _qwen(model_type: str, projector: tuple[str, ...], **more: Any) -> Family:
    return Family(
        model_type,
        vision_tower="model.visual",
        vision_layers="blocks",
        projector=projector,
        language_model="model.language_model",
        layers="layers",
        head="lm_head",
        positions="mrope",
        merges=_tower_square,
        one_sequence=True,
        **more,
    )


def _idefics(model_type: str, merges: Callable[[Any], int] | None) -> Family:
    return Family(
        model_type,
        vision_tower="model.vision_model",
        vision_layers="encoder.layers",
        projector=("model.connector",),
        language_model="model.text_model",
        layers="layers",
        head="lm_head",
        merges=merges,
    )


def _blip(model_type: str, text: str, language_model: str, layers: str, **more: Any) -> Family:
    return Family(
        model_type,
        vision_tower="vision_model",
        vision_layers="encoder.layers",
        projector=("qformer", "language_projection", "query_tokens"),
        language_model=f"language_model.{language_model}",
        layers=layers,
        head="language_model.lm_head",
        text_types=(text,),
        root="",
        visual=lambda config: int(config.num_query_tokens),
        one_size=True,
        merges=None,
        chat_template=BLIP_TEMPLATE,
        **more,
    )


INSTRUCTED: Mapping[str, Any] = {"instructed": True, "unread": _text_after_the_queries}
FAMILIES: tuple[Family, ...] = (
    _llava("llava", "encoder.layers", one_size=True),
    _llava("llava_next", "encoder.layers", projector=(PROJECTOR, "model.image_newline")),
    _llava("llava_onevision", "encoder.layers", projector=(PROJECTOR, "model.image_newline")),
    _qwen("qwen2_vl", ("model.visual.merger",), tower_width=_embed_width, block_width=_embed_width),
    _qwen("qwen2_5_vl", ("model.visual.merger",)),
    _qwen("qwen3_vl", ("model.visual.merger", "model.visual.deepstack_merger_list")),
    _llava("internvl", "encoder.layer", tower_width=_shuffled_width),
    _idefics("idefics2", merges=None),
    _idefics("idefics3", merges=_scaled_square),
    _idefics("smolvlm", merges=_scaled_square),
    _llava(
        "paligemma",
        "encoder.layers",
        attends="prefix",
        one_size=True,
        visual=lambda config: int(config.text_config.num_image_tokens),
        chat_template=PALIGEMMA_TEMPLATE,
    ),
    _llava(
        "gemma3",
        "encoder.layers",
        attends="pictures",
        one_size=True,
        image_token="boi_token",
        merges=_whole_grid,
    ),
    _llava("mistral3", "transformer.layers", merges=_merged_square, one_sequence=True),
    _llava("fast_vlm", None, one_size=True),
    _blip("instructblip", "t5", "encoder", "block", decoder="decoder", heads=CROSS, **INSTRUCTED),
    _blip("instructblip", "llama", "model", "layers", **INSTRUCTED),
    _blip("blip-2", "opt", "model", "decoder.layers", heads="self_attn.out_proj"),
    _blip("blip-2", "t5", "encoder", "block", decoder="decoder", heads=CROSS),
)


def family_of(config: Any) -> Family:
    """The table row of a model, by its configuration.

    Raises:
        BackboneError: there is none.
    """
    model_type = config.model_type
    text_config: Mapping[str, Any] | Any = getattr(config, "text_config", None)
    text_type = getattr(text_config, "model_type", "none")
    for family in FAMILIES:
        if family.model_type == model_type and (not family.text_types or text_type in family.text_types):
            return family
    known = ", ".join("/".join((family.model_type, *family.text_types)) for family in FAMILIES)
    raise BackboneError(
        f"model type {model_type!r} with a language model of type {text_type!r} has no row in "
        f"mmicl_core/backbones/families.py (known: {known}): add one that says where its vision tower, "
        "projector, language model and head are"
    )


def family_in(folder: Path) -> Family:
    """The table row of a model folder, by its `config.json` alone.

    Raises:
        BackboneError: there is none, or no such file.
    """
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{folder} is not a model folder: its config.json cannot be read ({error})"
        ) from error
    text = SimpleNamespace(**{"model_type": None, **(told.get("text_config") or {})})
    return family_of(SimpleNamespace(model_type=told.get("model_type"), text_config=text))


def vision_blocks_read(config: Any, blocks: int) -> int:
    """How many of a vision tower's blocks run before the last of the states that the projector takes.

    Args:
        blocks: those that the tower has.

    Raises:
        BackboneError: the configuration names states that the tower does not have.
    """
    read = _layers_read(config)
    # State 0 is what enters the first block, state n what block n gives.
    after = [number if number >= 0 else blocks + 1 + number for number in read]
    if not all(0 <= number <= blocks for number in after):
        raise BackboneError(
            f"vision_feature_layer names the hidden states {list(read)}, the vision tower has {blocks + 1}: "
            "mend it in the model's config.json"
        )
    return max(after)


def part(model: nn.Module, path: str) -> nn.Module:
    """Follow a module path.

    Raises:
        BackboneError: it ends early; says where and which parts exist there.
    """
    module = model
    for depth, name in enumerate(path.split(".")):
        children = dict(module.named_children())
        if name not in children:
            where = ".".join(path.split(".")[:depth]) or type(model).__name__
            raise BackboneError(f"looked for {path!r}: {where} has no {name!r}, it has {sorted(children)}")
        module = children[name]
    return module

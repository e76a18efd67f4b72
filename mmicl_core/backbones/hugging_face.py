"""A `Backbone` out of a stock Hugging Face image-text-to-text model, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmicl_core.backbones.families import family_of, part
from mmicl_core.data.files import folder_digest
from mmicl_core.errors import BackboneError

__all__ = ["HuggingFaceBackbone", "backbone_identity", "load_backbone", "load_for_inference"]

LARGEST_FILE = "7MB"
READ_BY_THE_MODEL = (".bin", ".json", ".jinja", ".model", ".safetensors", ".txt")


class HuggingFaceBackbone(nn.Module):
    """The roles of `families.FAMILIES` behind the operations of `base.Backbone`.

    Args:
        model: what `AutoModelForImageTextToText` gave.
        processor: its image processor and tokenizer.
        identity: names the weights.
    """

    # Modules of a foreign library: what they take and give is not known to a type checker.
    model: Any
    vision_tower: Any
    projector: Any
    language_model: Any
    head: Any

    def __init__(self, model: Any, processor: Any, identity: str) -> None:
        super().__init__()
        family = family_of(model.config.model_type)
        self.model = model
        self.processor = processor
        self.identity = identity
        self.vision_tower = part(model, family.vision_tower)
        self.projector = part(model, family.projector)
        self.language_model = part(model, family.language_model)
        self.head = part(model, family.head)
        self.requires_grad_(requires_grad=False)
        self.eval()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.processor.tokenizer

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.text_config.hidden_size)

    @property
    def visual_tokens(self) -> int:
        """V: the grid of patches; the class token is dropped under the default selection."""
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return int(patches + (self.model.config.vision_feature_select_strategy == "full"))

    @property
    def vision_width(self) -> int:
        """W."""
        return int(self.model.config.vision_config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are computed in."""
        return next(self.language_model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.language_model.parameters()).device

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Decoded pictures -> (N, 3, height, width), as the model's own processor prepares them."""
        return self.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(N, 3, height, width) -> (N, V, W)."""
        return self.tower_states(pixels)

    def tower_states(self, pixels: Tensor) -> Tensor:
        """As `encode_pixels`, with gradient: for training the tower itself."""
        config = self.model.config
        output = self.vision_tower(
            pixel_values=pixels.to(self.device, next(self.vision_tower.parameters()).dtype),
            output_hidden_states=True,
        )
        vision_NVW = output.hidden_states[config.vision_feature_layer]
        drop_class_token = config.vision_feature_select_strategy == "default"
        return vision_NVW[:, 1:] if drop_class_token else vision_NVW

    def project(self, vision_NVW: Tensor) -> Tensor:
        """(N, V, W) -> (N, V, D)."""
        return self.projector(vision_NVW.to(self.device, self.dtype))

    def embed(self, ids_BL: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.language_model.get_input_embeddings()(ids_BL)

    def hidden(self, embeds_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Last hidden states after the final norm, (B, L, D); positions count unmasked tokens."""
        positions_BL = (mask_BL.long().cumsum(1) - 1).clamp(min=0)
        output = self.language_model(
            inputs_embeds=embeds_BLD,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            use_cache=False,
        )
        return output.last_hidden_state

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """(..., D) -> (..., vocabulary)."""
        return self.head(hidden_BLD)

    @torch.no_grad()
    def generate(self, embeds_BLD: Tensor, mask_BL: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuation of left-padded prompts; the end token and what follows it are cut."""
        ids_BL = self.model.generate(
            inputs_embeds=embeds_BLD,
            attention_mask=mask_BL,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        end = self.tokenizer.eos_token_id
        answers = [row.tolist() for row in ids_BL]
        return [ids[: ids.index(end)] if end in ids else ids for ids in answers]

    def save(self, folder: Path) -> None:
        """Write model and processor as Hugging Face does, 16-bit, in files that a forge accepts."""
        folder.mkdir(parents=True, exist_ok=True)
        # Tied weights stay one tensor, or they would be written twice.
        halves: dict[int, Tensor] = {}
        weights = {
            name: halves.setdefault(tensor.data_ptr(), tensor.detach().half())
            for name, tensor in self.model.state_dict().items()
        }
        self.model.config.dtype = torch.float16
        self.model.save_pretrained(folder, state_dict=weights, max_shard_size=LARGEST_FILE)
        self.processor.save_pretrained(folder)


def load_backbone(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str = "sdpa"
) -> HuggingFaceBackbone:
    """Load a model folder that `save_pretrained` wrote; `attention` names code of transformers.

    Raises:
        BackboneError: the folder is no such model, or its family is unknown.
    """
    identity = backbone_identity(folder)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
        processor = AutoProcessor.from_pretrained(folder)
    # ImportError: a library that `attention` needs is not installed.
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise BackboneError(f"{folder} cannot be loaded as an image-text-to-text model: {error}") from error
    return HuggingFaceBackbone(model.to(device), processor, identity=identity)


def load_for_inference(folder: Path) -> HuggingFaceBackbone:
    """The model on a GPU in bf16 where there is one, else on the CPU in 32 bits. Raises as above."""
    if torch.cuda.is_available():
        return load_backbone(folder, dtype=torch.bfloat16, device="cuda")
    return load_backbone(folder)


def backbone_identity(folder: Path) -> str:
    """Digest of weights, configuration, tokenizer, chat template and picture preparation.

    Whatever changes what the model reads changes the name, so that a cache never mixes two models.

    Raises:
        BackboneError: the folder is no model.
    """
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} is not a model folder: it has no config.json")
    return folder_digest(folder, READ_BY_THE_MODEL)

"""M2PT: prompts in all layers of vision tower and language model (Wang et al., EMNLP 2024, arXiv:2409.15657).

Visual prompts P_v stand before a picture's patches in every block of the tower, textual prompts P_t before
all else in every block of the language model. What a block makes of its prompts is dropped, and the next one
gets others. The projector is trained, and takes one more set of visual prompts beside what the tower gives:
the cross-modality interaction.

    [_, I_l] = block_l([P_v(l), I_(l-1)])       l = 1 .. r      the tower, up to the states that are read
    [F, V] = projector([P_v(r+1), I_r])                         soft tokens F before visual tokens V
    [_, X_l] = layer_l([P_t(l), X_(l-1)])       l = 1 .. K      the language model, X_0 = text with [F, V]

    visual prompts     (r + 1, n_v, W)
    textual prompts    (K, n_t, D), at positions 0 to n_t - 1, before the start token

Trained: (r + 1) n_v W + K n_t D, and the projector: 5 754 880 around LLaVA v1 of Vicuna 7B and CLIP ViT-L/14
(r = 23, n_v = n_t = 10, a projector of one matrix), which the paper counts as 0.09 %.

The released code reads hidden_states[-2] with its prompts, and drops the first one where it means to drop
the class token: n_v - 1 prompts, the class token and the patches reach the language model. It trains the
head, too. That is `released`; `clean` gives the language model all n_v prompts and the patches.

Open in the paper, and settled here: of a tower that is read at its end, all blocks count, of a convolutional
one, none; a projector that merges states gets each prompt as a picture that is this prompt all over; one that
resamples reads the prompts beside the picture's states, and makes no tokens of them; what an encoder makes of
its prompts is seen by the decoder. Prompts start Xavier-uniform over (1, n, width), as in the released code.

Prompts keep the type that they are trained in and are cast where they are used: a tower that is cast to 16
bits must not take them along, as it does in the released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmicl_core.backbones.deep_prompts import class_states, prompts_before_pictures, prompts_beside_states
from mmicl_core.backbones.families import vision_blocks_read
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.backbones.vision import PictureBatch
from mmicl_core.config.model import M2ptConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Method, PromptBatch
from mmicl_core.prompts import Piece, Prompt, Turn

__all__ = ["DeepPrompts", "M2pt"]

# Grey, since Idefics takes a picture of nothing but zeros for padding.


class DeepPrompts(nn.Module):
    """One set of prompts for each of K layers, (K, n, width)."""

    def __init__(self, layers: int, prompts: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(layers, prompts, width))
        for layer in self.vectors.detach():
            nn.init.xavier_uniform_(layer[None])

    def forward(self) -> Tensor:
        """All of them."""
        # A copy: under ZeRO-3 a parameter is whole only while its own module runs.
        return self.vectors.clone()


class M2pt(Method):
    """Trains prompts in all layers, and the projector between them."""

    takes: ClassVar[Literal["pixels"]] = "pixels"
    changes_backbone: ClassVar[bool] = True
    writes_turns_apart: ClassVar[bool] = True

    def __init__(self, backbone: HuggingFaceBackbone, config: M2ptConfig) -> None:
        super().__init__(backbone)
        self.config = config
        if config.preset == "released":
            _refuse_unless_llava(backbone)
        blocks = list(backbone.vision_layers or ())
        self.blocks = blocks[: vision_blocks_read(backbone.model.config, len(blocks))] if blocks else []
        """Those of the tower that run before its states are read."""
        self.visual_prompts: DeepPrompts | None = None
        if config.visual_prompts:
            width = backbone.family.block_width(backbone.model.config)
            self.visual_prompts = DeepPrompts(len(self.blocks) + 1, config.visual_prompts, width)
        self.textual_prompts: DeepPrompts | None = None
        if config.textual_prompts:
            self.textual_prompts = DeepPrompts(len(backbone.layers), config.textual_prompts, backbone.width)
        if config.train_projector:
            backbone.unfreeze("projector")
        if config.train_head:
            _unfreeze_head(backbone)
        if config.start is not None:
            load_parameters(self, Path(config.start))

    @property
    def tokens_per_picture(self) -> int:
        """Soft tokens that stand before the visual tokens of each picture."""
        return self.config.visual_prompts if self.backbone.family.merges is not None else 0

    def write_turn(self, turn: Turn) -> Prompt:
        """A turn with a place for soft tokens before every picture, if there are any."""
        pieces = super().write_turn(turn)
        if not self.tokens_per_picture:
            return pieces
        return [
            part
            for piece in pieces
            for part in ([Piece("fused"), piece] if piece.kind == "image" else [piece])
        ]

    def embed_without_opening(self, batch: PromptBatch, fused: Tensor | None = None) -> Embedded:
        """A batch without the textual prompts, to stand behind `static_prefix`."""
        assert fused is None, "soft tokens of pictures would take the places of demonstrations"
        packed = batch.packed.to(self.backbone.device)
        visual, soft_tokens = self.look(batch)
        return self.backbone.embed(packed, visual, soft_tokens)

    def opening(self) -> tuple[Tensor, Tensor] | None:
        """The textual prompts."""
        if self.textual_prompts is None:
            return None
        prompts_KSD = self.textual_prompts()
        return prompts_KSD[0], prompts_KSD[1:]

    @torch.no_grad()
    def static_prefix(self) -> Any:
        """Keys and values of the textual prompts, the same before all else; None where there are no prompts.

        A layer makes keys and values of what enters it, and that is its own prompts, whatever follows them.
        `Decoding` goes on from here with what `embed_without_opening` gives, and needs no hook.

        Raises:
            ConfigError: the model's prompts go into an encoder, which keeps no keys and values.
        """
        if self.backbone.family.decoder is not None:
            raise ConfigError(
                f"the prompts of this {self.backbone.model.config.model_type} go into an encoder, which "
                "keeps no keys and values: answer with `embed`, which puts the textual prompts before each"
            )
        if self.textual_prompts is None:
            return None
        nothing = self.backbone.embed(self.pack([[]], ()).packed.to(self.backbone.device))
        return self.backbone.read(self.behind_opening(nothing), use_cache=True).past_key_values

    def look(self, batch: PromptBatch) -> tuple[Tensor, Tensor | None]:
        """Visual tokens of all pictures, (sum of V, D), and the soft tokens before them, (N n_v, D).

        A batch without pictures has none of either, but a blank one is looked at all the same: all workers of
        a run have to call the same modules, and every parameter has to get a gradient, be it zero.
        """
        pictures = batch.pictures
        assert pictures.features is None, "the prompts stand inside the tower: it has to run"
        if len(pictures):
            return self._look(pictures)
        visual, soft_tokens = self._look(self.blank)
        return visual[:0], None if soft_tokens is None else soft_tokens[:0]

    def _look(self, pictures: PictureBatch) -> tuple[Tensor, Tensor | None]:
        backbone = self.backbone
        if self.visual_prompts is None:
            return backbone.vision.see(pictures), None
        prompts_KSW = self.visual_prompts()
        inner_KSW, last_SW = prompts_KSW[:-1], prompts_KSW[-1]
        inside = prompts_before_pictures(self.blocks, inner_KSW, one_sequence=backbone.family.one_sequence)
        if backbone.family.merges is None:
            with inside, prompts_beside_states(backbone.projector, last_SW):
                return backbone.vision.see(pictures), None
        with inside, self._class_states() as classes_NW:
            visual = backbone.vision.see(pictures)
        return visual, self._project(last_SW, classes_NW, len(pictures))

    def _project(self, last_SW: Tensor, classes_NW: list[Tensor], pictures: int) -> Tensor:
        """The interaction: soft tokens of all pictures, (N n_v, D)."""
        if self.config.preset == "clean":
            tokens_SD = self.backbone.vision.project_states(last_SW)
            return tokens_SD.expand(pictures, -1, -1).flatten(0, 1)
        kept = len(last_SW) - 1
        tokens_SD = self.backbone.vision.project_states(torch.cat([last_SW[1:], *classes_NW]))
        prompts_NSD = tokens_SD[:kept].expand(pictures, -1, -1)
        return torch.cat([prompts_NSD, tokens_SD[kept:, None]], dim=1).flatten(0, 1)

    @contextmanager
    def _class_states(self) -> Iterator[list[Tensor]]:
        if self.config.preset == "clean":
            yield []
            return
        with class_states(self.blocks[-1]) as seen:
            yield seen


def _refuse_unless_llava(backbone: HuggingFaceBackbone) -> None:
    config = backbone.model.config
    read = getattr(config, "vision_feature_layer", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if config.model_type != "llava" or strategy != "default" or not isinstance(read, int):
        raise ConfigError(
            "method.preset 'released' passes on the class token of a LLaVA that reads one layer of its tower "
            f"without it, but this {config.model_type} has vision_feature_layer {read!r} and "
            f"vision_feature_select_strategy {strategy!r}: set method.preset to 'clean'"
        )


def _unfreeze_head(backbone: HuggingFaceBackbone) -> None:
    if not list(backbone.role_parameters("head")):
        raise ConfigError(
            "method.train_head is true, but the head of this model is its token embeddings, which would be "
            "trained too: set it to false"
        )
    backbone.unfreeze("head")

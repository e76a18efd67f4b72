"""AIM: demonstrations fused into virtual tokens (Gao et al., AAAI 2025, arXiv:2406.07588).

The frozen backbone reads each demonstration alone, picture and text together. Hidden states on the
text have attended to the picture, so the picture's positions are dropped and one trained projection
maps the others back to the input space of the language model. A demonstration of V visual and T text
tokens costs T tokens in the prompt instead of V + T, and can be kept.

Shapes (letters in `mmicl_core.shapes`):
    states_TD    last hidden states, after the final norm, on the text of one demonstration
    fused_TD     what the query's prompt sees in its place
Trained: the projection, D x D, and a LayerNorm. Everything else is frozen.

Open in the paper and chosen here: the read-out layer (the last), the positions (all text of the
demonstration), LayerNorm (as in SelfCP by the same first author) and the start (the identity, scaled to
the spread of the token embeddings, so that training begins near tokens that the model can read).

Demonstrations never see each other; their order exists only in the prompt. That is what makes them
cacheable, and why `read` must not depend on the batch that a demonstration sits in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import AimConfig
from mmicl_core.data.collate import Packed, pack
from mmicl_core.data.files import folder_digest
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.base import Lookup, Method, answer_nll, episode_turns, prompt_embeddings, stack
from mmicl_core.prompts import ChatFormat, Piece, Prompt, Turn, count_tokens, demonstration_key

__all__ = [
    "Aggregator",
    "Aim",
    "AimBatch",
    "aggregator_identity",
    "fused_prompt",
    "read_demonstrations",
]

WEIGHTS_FILE = "aggregator.safetensors"
ABOUT_FILE = "aggregator.json"


class Aggregator(nn.Module):
    """The projection: states on a demonstration's text -> fused tokens, both (..., T, D)."""

    def __init__(self, width: int, *, layer_norm: bool = True, embedding_spread: float = 1.0) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self.norm: nn.Module = nn.Identity()
        if layer_norm:
            self.norm = nn.LayerNorm(width)
            nn.init.constant_(self.norm.weight, embedding_spread)

    def forward(self, states: Tensor) -> Tensor:
        """Fused tokens."""
        return self.norm(self.projection(states))

    def save(self, folder: Path, backbone: str) -> None:
        """Write weights and what they fit; `backbone` is the identity of the model trained with."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().float().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)
        about = {"method": "aim", "width": self.projection.in_features, "backbone": backbone}
        about["layer_norm"] = isinstance(self.norm, nn.LayerNorm)
        (folder / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, backbone: HuggingFaceBackbone) -> Aggregator:
        """Read what `save` wrote.

        Raises:
            CheckpointError: no aggregator is there, or it was trained on another backbone.
        """
        if not (folder / ABOUT_FILE).is_file():
            raise CheckpointError(f"{folder} holds no aggregator: it has no {ABOUT_FILE}")
        try:
            about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
            width, identity, layer_norm = about["width"], about["backbone"], about["layer_norm"]
            weights = load_file(folder / WEIGHTS_FILE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"the aggregator in {folder} cannot be read: {error!r}") from error
        if width != backbone.width or identity != backbone.identity:
            raise CheckpointError(
                f"the aggregator in {folder} was trained for backbone {identity} of width {width}, the "
                f"model is {backbone.identity} of width {backbone.width}: train one for this model with "
                "`mmicl train`"
            )
        aggregator = cls(width, layer_norm=layer_norm)
        aggregator.load_state_dict(weights)
        return aggregator.to(backbone.device).requires_grad_(requires_grad=False)


def aggregator_identity(folder: Path) -> str:
    """Digest of an aggregator's weights and of what they fit.

    Raises:
        CheckpointError: no aggregator is there.
    """
    if not (folder / ABOUT_FILE).is_file():
        raise CheckpointError(f"{folder} holds no aggregator: it has no {ABOUT_FILE}")
    return folder_digest(folder, (".json", ".safetensors"))


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations that the frozen backbone still has to read, each a prompt of its own."""

    packed: Packed
    pictures: Tensor
    prefix: int
    """Tokens at the head of each prompt that belong to no turn."""


@dataclass(frozen=True)
class AimBatch:
    """Queries behind fused demonstrations."""

    packed: Packed
    pictures: Tensor
    shown: list[Tensor] | Demonstrations
    """Kept states of the demonstrations, (T, D) each, or what they are read from."""

    @property
    def num_scored(self) -> int:
        """Answer tokens."""
        return self.packed.num_scored


class Aim(Method):
    """Trains the aggregator: answers of queries behind fused demonstrations (section 1.4's objective)."""

    needs_states = True

    def __init__(self, backbone: HuggingFaceBackbone, config: AimConfig) -> None:
        super().__init__(backbone)
        if config.start is not None:
            self.aggregator = Aggregator.load(Path(config.start), backbone).requires_grad_()
        else:
            spread = float(backbone.language_model.get_input_embeddings().weight.detach().float().std())
            self.aggregator = Aggregator(
                backbone.width, layer_norm=config.layer_norm, embedding_spread=spread
            )

    def collate(self, rows: Sequence[Mapping[str, Any]], features: Lookup, states: Lookup | None) -> AimBatch:
        """Episodes -> queries; the demonstrations are looked up in `states`, or read with the queries."""
        prompts, lengths, pictures, demonstrations = [], [], [], list[Turn]()
        states_TD = list[torch.Tensor]()
        for row in rows:
            *shown, query = episode_turns(row)
            prompts.append(fused_prompt(self.chat, len(shown), query))
            if states is None:
                lengths.append([count_tokens(self.chat.turn(turn), 0)[1] for turn in shown])
            else:
                # Rendering a turn again costs more than all else here.
                kept = [torch.tensor(states[demonstration_key(turn)]) for turn in shown]
                lengths.append([len(state) for state in kept])
                states_TD += kept
            pictures.append(query.picture)
            demonstrations += shown
        packed = pack(
            prompts,
            visual_tokens=self.backbone.visual_tokens,
            fused_tokens=lengths,
            padding_id=self.backbone.tokenizer.pad_token_id,
        )
        asked = stack(features, pictures)
        if states is not None:
            return AimBatch(packed, asked, states_TD)
        seen = stack(features, [turn.picture for turn in demonstrations])
        return AimBatch(packed, asked, pack_demonstrations(self.backbone, self.chat, demonstrations, seen))

    def forward(self, batch: AimBatch) -> Tensor:
        """Negative log-likelihood of the queries' answer tokens."""
        shown = batch.shown
        states_TD = read_packed(self.backbone, shown) if isinstance(shown, Demonstrations) else shown
        lengths = [len(state) for state in states_TD]
        device, dtype = self.backbone.device, self.backbone.dtype
        # States are kept in 16 bits, which autocast on a CPU cannot join.
        states = torch.cat([state.to(device, dtype) for state in states_TD])
        fused_TD = self.aggregator(states).split(lengths)
        packed = batch.packed.to(device)
        embeds_BLD = prompt_embeddings(self.backbone, packed, batch.pictures, fused_TD)
        return answer_nll(self.backbone, embeds_BLD, packed)

    def save(self, folder: Path) -> None:
        """Write the aggregator."""
        self.aggregator.save(folder, self.backbone.identity)


def fused_prompt(chat: ChatFormat, demonstrations: int, query: Turn) -> Prompt:
    """The prefix, a place for each demonstration's fused tokens, the query with its picture."""
    places = [Piece("fused", reference=str(number)) for number in range(demonstrations)]
    return [*chat.prefix(), *places, *chat.turn(query)]


def read_demonstrations(
    backbone: HuggingFaceBackbone, chat: ChatFormat, turns: Sequence[Turn], pictures: Tensor
) -> list[Tensor]:
    """Let the frozen backbone read each demonstration alone.

    Args:
        turns: demonstrations with pictures and answers.
        pictures: of each turn, as `prompt_embeddings` takes them.

    Returns:
        For each its states on all of its text, (T, D); T counts the text of the turn, not the prefix.
    """
    return read_packed(backbone, pack_demonstrations(backbone, chat, turns, pictures))


def pack_demonstrations(
    backbone: HuggingFaceBackbone, chat: ChatFormat, turns: Sequence[Turn], pictures: Tensor
) -> Demonstrations:
    """Lay demonstrations out to be read; the arguments are those of `read_demonstrations`."""
    prefix = chat.prefix()
    prompts = [[*prefix, *chat.turn(turn)] for turn in turns]
    packed = pack(prompts, visual_tokens=backbone.visual_tokens, padding_id=backbone.tokenizer.pad_token_id)
    return Demonstrations(packed, pictures, sum(len(piece.ids) for piece in prefix))


@torch.no_grad()
def read_packed(backbone: HuggingFaceBackbone, shown: Demonstrations) -> list[Tensor]:
    """States of each demonstration on all of its text, (T, D), in one pass of the frozen backbone."""
    packed = shown.packed.to(backbone.device)
    hidden_BLD = backbone.hidden(prompt_embeddings(backbone, packed, shown.pictures), packed.mask_BL)
    text_BL = packed.mask_BL.bool() & ~packed.image_BL
    text_BL[:, : shown.prefix] = False
    return [hidden[text] for hidden, text in zip(hidden_BLD, text_BL, strict=True)]

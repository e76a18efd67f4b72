"""AIM: demonstrations fused into virtual tokens (Gao et al., AAAI 2025, arXiv:2406.07588).

The frozen backbone reads each demonstration alone, pictures and text together. Hidden states on the text
have attended to the pictures, so the pictures' positions are dropped and one trained projection maps the
others back to the input space of the language model. A demonstration of V visual and T text tokens costs
T tokens in the prompt instead of V + T, and can be kept:

    H = backbone([V; T]) at T        states_TD, of one demonstration
    Z = norm(W H + b)                fused_TD, in its place
    loss = -log p(answer | Z_1 .. Z_S, query)

Trained: W and b, D x D + D (16.8 M at D = 4096), and a LayerNorm. Everything else is frozen.

Open in the paper and settings here: the layer that H is read from (the last, after the final norm), whether
T is all text or the answer's alone (all), the LayerNorm (SelfCP by the same first author has one), the start
(the identity, scaled to the spread of the token embeddings, so that training begins near tokens that the
model can read) and what stands between demonstrations (nothing).

Demonstrations never see each other; their order exists only in the prompt. That is what makes them
cacheable, and why `read` must not depend on the batch that a demonstration sits in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.backbones.vision import PictureBatch, look_up
from mmicl_core.config.model import AimConfig
from mmicl_core.data.collate import Packed, pack
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Method, Pictures, Side, States, episode_turns
from mmicl_core.prompts import Prompt, Turn, count_text, demonstration_key

__all__ = ["Aggregator", "Aim", "AimBatch", "Demonstrations", "Reader"]


class Aggregator(nn.Module):
    """The projection: states on a demonstration's text -> fused tokens, both (..., T, D)."""

    def __init__(self, width: int, config: AimConfig, embedding_spread: float = 1.0) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        if config.initial == "identity":
            nn.init.eye_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        self.norm: nn.Module = nn.Identity()
        if config.layer_norm:
            self.norm = nn.LayerNorm(width)
            nn.init.constant_(self.norm.weight, embedding_spread)

    def forward(self, states: Tensor) -> Tensor:
        """Fused tokens."""
        return self.norm(self.projection(states))


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations that the frozen backbone still has to read, each a prompt of its own."""

    packed: Packed
    pictures: PictureBatch
    kept: tuple[int, ...]
    """How many states of each are kept, the last ones on its text."""


@dataclass(frozen=True)
class AimBatch:
    """Prompts behind fused demonstrations."""

    packed: Packed
    pictures: PictureBatch
    shown: list[Tensor] | Demonstrations
    """Kept states of the demonstrations, (T, D) each, or what they are read from."""

    @property
    def num_scored(self) -> int:
        """Answer tokens."""
        return self.packed.num_scored


class Reader:
    """The frozen half: what the backbone makes of each demonstration.

    Args:
        config: which layer and which text are read; the rest does not matter here.
    """

    def __init__(self, backbone: HuggingFaceBackbone, config: AimConfig) -> None:
        self._backbone, self._config, self._chat = backbone, config, backbone.chat

    def fused_tokens(self, turn: Turn) -> int:
        """T: tokens of a demonstration that states are kept of."""
        pieces = self._chat.turn(turn)
        # What an answer ends with belongs to it; it is the last piece of a turn.
        return len(pieces[-1].ids) if self._config.text == "answer" else count_text(pieces)

    def pack(self, turns: Sequence[Turn], pictures: Pictures) -> Demonstrations:
        """Lay demonstrations out to be read.

        Args:
            turns: with pictures and answers.
        """
        prompts = [self._chat.conversation([turn]) for turn in turns]
        prepared, shown = look_up(turns, pictures)
        packed = pack(prompts, pictures=prepared, padding_id=self._backbone.tokenizer.pad_token_id)
        kept = tuple(self.fused_tokens(turn) for turn in turns)
        return Demonstrations(packed, shown, kept)

    @torch.no_grad()
    def read(self, shown: Demonstrations) -> list[Tensor]:
        """States of each demonstration on its text, (T, D), in one pass of the frozen backbone."""
        packed = shown.packed.to(self._backbone.device)
        visual = self._backbone.see(shown.pictures)
        prompts, layer = self._backbone.embed(packed, visual), self._config.layer
        output = self._backbone.read(prompts, output_hidden_states=layer is not None)
        hidden_BLD = output.last_hidden_state if layer is None else output.hidden_states[layer]
        rows = zip(hidden_BLD, packed.text_BL, shown.kept, strict=True)
        return [hidden[text][-kept:] for hidden, text, kept in rows]


class Aim(Method):
    """Trains the aggregator: answers behind fused demonstrations, through the frozen language model."""

    def __init__(self, backbone: HuggingFaceBackbone, config: AimConfig) -> None:
        super().__init__(backbone)
        self.config = config
        self.reader = Reader(backbone, config)
        self.aggregator = Aggregator(backbone.width, config, backbone.embedding_spread())
        if config.start is not None:
            load_parameters(self, Path(config.start))

    def collate(
        self,
        rows: Sequence[Mapping[str, Any]],
        pictures: Pictures,
        states: States | None,
        side: Side = "right",
    ) -> AimBatch:
        """As `arrange`, with demonstrations that are looked up in `states`, or read."""
        return self.arrange([episode_turns(row) for row in rows], pictures, side, states=states)

    def arrange(
        self,
        conversations: Sequence[Sequence[Turn]],
        pictures: Pictures,
        side: Side = "right",
        *,
        raw: Iterable[int] = repeat(0),
        states: States | None = None,
    ) -> AimBatch:
        """Queries behind places for their demonstrations.

        Args:
            raw: of each conversation, how many of the last demonstrations are written out instead.
            states: of demonstrations by key; None reads these with the queries.
        """
        prompts, seen, shown, states_TD = list[Prompt](), list[Turn](), list[Turn](), list[Tensor]()
        for (*demonstrations, query), count in zip(conversations, raw, strict=False):
            last = max(len(demonstrations) - count, 0)
            fused, written = demonstrations[:last], demonstrations[last:]
            prompts.append(self.prompt(len(fused), [*written, query]))
            seen += [*written, query]
            shown += fused
            if states is not None:
                # Arrays may be mapped from disk, read-only, which torch insists on copying.
                states_TD += [torch.tensor(states[demonstration_key(turn)]) for turn in fused]
        kept = states_TD if states is not None else self.reader.pack(shown, pictures)
        # Rendering a turn again costs more than all else here, so lengths come with the states.
        lengths = kept.kept if isinstance(kept, Demonstrations) else [len(state) for state in kept]
        prepared, asked = look_up(seen, pictures)
        packed = pack(prompts, pictures=prepared, fused_tokens=lengths, padding_id=self.padding_id, side=side)
        return AimBatch(packed, asked, kept)

    def demonstration_tokens(self, turn: Turn, pictures: Pictures) -> int:
        """T, and what stands between."""
        return self.reader.fused_tokens(turn) + count_text(list(self.chat.text(self.config.separator)))

    def prompt(self, fused: int, turns: Sequence[Turn]) -> Prompt:
        """The prefix, a place for each fused demonstration, and the turns that are written out."""
        pieces = self.chat.conversation(turns, fused)
        between = list(self.chat.text(self.config.separator))
        return [
            part for piece in pieces for part in ([piece, *between] if piece.kind == "fused" else [piece])
        ]

    def fuse(self, states_TD: Sequence[Tensor]) -> list[Tensor]:
        """States of demonstrations -> their fused tokens, (T, D) each."""
        return list(torch.split(self._fuse(states_TD), [len(state) for state in states_TD]))

    def fuse_to_keep(self, states_TD: Sequence[Tensor]) -> list[Tensor]:
        """As `fuse`, each with the separator behind it: for prompts that are laid out without this method."""
        ids = [token for piece in self.chat.text(self.config.separator) for token in piece.ids]
        between = torch.tensor(ids, dtype=torch.long, device=self.backbone.device)
        behind = self.backbone.model.get_input_embeddings()(between)
        return [torch.cat([fused, behind.to(fused.dtype)]) for fused in self.fuse(states_TD)]

    def embed(self, batch: AimBatch) -> Embedded:
        """Fused tokens at their places, the query with its pictures."""
        shown = batch.shown
        if isinstance(shown, Demonstrations):
            shown = self.reader.read(shown) if shown.kept else []
        visual = self.see(batch.pictures)
        return self.backbone.embed(batch.packed.to(self.backbone.device), visual, self._fuse(shown))

    def calls(self, batch: AimBatch) -> Mapping[str, int]:
        """Also how many demonstrations the frozen backbone reads, and of these how many pictures."""
        shown = batch.shown
        kept, pictures = (
            (len(shown.kept), len(shown.pictures)) if isinstance(shown, Demonstrations) else (0, 0)
        )
        read = {"demonstrations": kept, "pictures of demonstrations": pictures}
        return {**super().calls(batch), **read}

    def _fuse(self, states_TD: Sequence[Tensor]) -> Tensor:
        """Fused tokens of all demonstrations, (sum of T, D); the aggregator runs also where there is none, as
        every worker of a run has to call the same modules."""
        device, dtype = self.backbone.device, next(self.aggregator.parameters()).dtype
        none = torch.empty(0, self.backbone.width, device=device, dtype=dtype)
        # States are kept in 16 bits, which autocast on a CPU cannot join.
        return self.aggregator(torch.cat([none, *(state.to(device, dtype) for state in states_TD)]))

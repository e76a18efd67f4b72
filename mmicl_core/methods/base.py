"""What every method is: a way to lay conversations out for a backbone, and what of it is trained.

A method turns rows (episodes, or pictures) into a batch, and a batch into what the language model reads. The
loss is the same for all of them: the negative log-likelihood of the tokens that are scored. Nothing here
knows how gradients are taken or where.

    rows --collate--> batch --embed--> prompts --backbone--> likelihood of answers, or answers

A new method overrides `write_turn`, `arrange` or `embed`, whichever is enough, and says which parameters it
owns.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from mmicl_core.backbones.decoding import generate, generate_by_beams
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.backbones.vision import PictureBatch, join
from mmicl_core.data.collate import Packed, pack
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.methods.adapter import save_parameters
from mmicl_core.prompts import Prompt, Turn, count_text

__all__ = [
    "ONE_BY_ONE",
    "Batch",
    "Method",
    "Pictures",
    "Plain",
    "PromptBatch",
    "Side",
    "States",
    "episode_turns",
]

Pictures = Mapping[str, PreparedPicture]
"""Pictures by key, with pixels or with what a frozen part made of them."""
Side = Literal["left", "right"]
ONE_BY_ONE = "pictures one by one"
BLANK = Image.new("RGB", (64, 64), "grey")


class Batch(Protocol):
    """What `Method.collate` makes and `Method.forward` takes."""

    @property
    def num_scored(self) -> int:
        """Targets of the batch, over which the loss is a mean."""
        ...


class States(Protocol):
    """Frozen states by key: an `ArrayStore`, or a dict."""

    def __getitem__(self, key: str) -> Any:
        """The array of a key."""
        ...


@dataclass(frozen=True)
class PromptBatch:
    """Prompts with their pictures."""

    packed: Packed
    pictures: PictureBatch

    @property
    def num_scored(self) -> int:
        """Answer tokens."""
        return self.packed.num_scored


class Method(nn.Module):
    """A way to learn from demonstrations, around one backbone."""

    reads: ClassVar[Literal["episodes", "pictures"]] = "episodes"
    """What one row of training data is."""
    takes: ClassVar[Literal["pixels", "visual_tokens", "tower_states"]] = "visual_tokens"
    """What pictures are to it: what frozen parts make of them is computed once and kept."""
    changes_backbone: ClassVar[bool] = False
    """Whether what it trains lies inside the backbone, which then is no longer the plain one."""
    writes_turns_apart: ClassVar[bool] = False
    """Whether a prompt is its turns as `write_turn` gives them, one after the other behind the `opening`, so
    that what stands before the last one does not depend on it and can be read apart from it."""
    looks: bool = False
    """Set while workers train together and pictures come as pixels: a batch without any then looks at a blank
    one, as all workers have to call the same modules."""
    config: Any
    """Its settings."""

    def __init__(self, backbone: HuggingFaceBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.chat = backbone.chat

    def collate(
        self,
        rows: Sequence[Mapping[str, Any]],
        pictures: Pictures,
        states: States | None,
        side: Side = "right",
    ) -> Any:
        """Rows -> a batch.

        Args:
            states: frozen states by demonstration; None where they were not kept, or are not needed.
            side: `right` pads for training, `left` for answers; the query of a row to be answered has none.
        """
        return self.arrange([episode_turns(row) for row in rows], pictures, side)

    def arrange(
        self, conversations: Sequence[Sequence[Turn]], pictures: Pictures, side: Side = "right"
    ) -> Any:
        """Turns of which the last is the query, of any number of pictures each -> a batch: every turn written
        out."""
        return self.lay_out(conversations, pictures, side)

    def write(self, turns: Sequence[Turn]) -> Prompt:
        """A conversation as a prompt, every turn written out."""
        return [*self.chat.prefix(), *(piece for turn in turns for piece in self.write_turn(turn))]

    def write_turn(self, turn: Turn) -> Prompt:
        """One turn of it."""
        return self.chat.turn(turn)

    @property
    def cut(self) -> Mapping[str, int]:
        """What was left out of texts so far, by what it was."""
        return {}

    def calls(self, batch: Any) -> Mapping[str, int]:
        """How much of a batch goes through parts that not every batch needs, by what it is.

        Where parameters are spread over workers, none of them may be 0 on one worker and not on another, and
        what goes through `ONE_BY_ONE` has to be as many on all.
        """
        return {"pictures": max(1, len(batch.pictures)) if self.looks else 0}

    def see(self, pictures: PictureBatch) -> Tensor | None:
        """Visual tokens of all pictures, (sum of V, D); of none, nothing, or no rows where a blank one was
        looked at: every parameter has to get a gradient, be it zero."""
        if len(pictures) or not self.looks:
            return self.backbone.see(pictures)
        return self.backbone.vision.see(self.blank)[:0]

    @cached_property
    def blank(self) -> PictureBatch:
        """A picture to look at where there is none."""
        return join([self.blank_picture], [""])

    @cached_property
    def blank_picture(self) -> PreparedPicture:
        """The same, by itself."""
        (prepared,) = self.backbone.prepare([BLANK])
        return prepared

    def embed(self, batch: Any) -> Embedded:
        """A batch as the language model takes it."""
        return self.behind_opening(self.embed_without_opening(batch))

    def embed_without_opening(self, batch: Any, fused: Tensor | None = None) -> Embedded:
        """The same without the soft tokens that stand before everything.

        Args:
            fused: tokens for the places of fused demonstrations, (sum of T, D).
        """
        return self.backbone.embed(batch.packed.to(self.backbone.device), self.see(batch.pictures), fused)

    def opening(self) -> tuple[Tensor, Tensor | None] | None:
        """Soft tokens that stand before every prompt, (S, D), with what takes their place at the entrance of
        each layer but the first, if anything; most methods have none."""
        return None

    def behind_opening(self, prompts: Embedded) -> Embedded:
        """Prompts with the soft tokens before them."""
        opening = self.opening()
        return prompts if opening is None else prompts.after(*opening)

    @property
    def tokens_per_picture(self) -> int:
        """Soft tokens that stand before the visual tokens of each picture."""
        return 0

    def applied(self, prompts: Embedded) -> AbstractContextManager[None]:
        """Whatever a method does to the language model while that reads `prompts`; most do nothing to it."""
        return nullcontext()

    def forward(self, batch: Any) -> Tensor:
        """Negative log-likelihood of every scored target of a batch, one vector."""
        prompts = self.embed(batch)
        with self.applied(prompts):
            return self.backbone.answer_nll(prompts, batch.packed.to(self.backbone.device))

    @torch.no_grad()
    def answer(self, batch: Any, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers to a batch that is padded on the left; ids before the end token."""
        return self.generate(self.embed(batch), max_new_tokens)

    def generate(self, prompts: Embedded, max_new_tokens: int, beams: int = 1) -> list[list[int]]:
        """Answers to prompts that are padded on the left, greedy or by beams; ids before the end token."""
        with self.applied(prompts):
            if beams > 1:
                return generate_by_beams(self.backbone, prompts, max_new_tokens, beams)
            return generate(self.backbone, prompts, max_new_tokens)

    def lay_out(
        self,
        conversations: Sequence[Sequence[Turn]],
        pictures: Pictures,
        side: Side = "right",
    ) -> PromptBatch:
        """Conversations as `write` writes them, with all their pictures."""
        shown = [
            (pictures[key], turn.question)
            for turns in conversations
            for turn in turns
            for key in turn.pictures
        ]
        return self.pack([self.write(turns) for turns in conversations], shown, side)

    def pack(
        self,
        prompts: Sequence[Prompt],
        shown: Sequence[tuple[PreparedPicture, str]],
        side: Side = "right",
        fused_tokens: Sequence[int] = (),
    ) -> PromptBatch:
        """Prompts, or parts of them, with their pictures.

        Args:
            shown: all pictures in their order, each with what is asked about it.
            fused_tokens: of each fused demonstration that has a place.
        """
        prepared = [picture for picture, _ in shown]
        packed = pack(
            prompts,
            pictures=prepared,
            fused_tokens=fused_tokens or repeat(self.tokens_per_picture),
            padding_id=self.padding_id,
            side=side,
        )
        return PromptBatch(packed, join(prepared, [question for _, question in shown]))

    @property
    def padding_id(self) -> int:
        """Fills what is no text."""
        return int(self.backbone.tokenizer.pad_token_id)

    def demonstration_tokens(self, turn: Turn, pictures: Pictures) -> int:
        """Positions of a prompt that one demonstration takes."""
        own = self.tokens_per_picture
        return count_text(self.chat.turn(turn)) + sum(own + len(pictures[key].ids) for key in turn.pictures)

    def epoch_order(self, rows: Sequence[Mapping[str, Any]], epoch: int, seed: int) -> list[int]:
        """The order in which one pass reads its rows; each pass after the first is shuffled.

        The first pass keeps the rows' own order, so that a curriculum stays one. Later ones move
        stretches of equal shots as a whole, so that a batch needs little padding.
        """
        runs: list[list[int]] = []
        for number, row in enumerate(rows):
            if not runs or rows[runs[-1][0]]["shots_of_both_classes"] != row["shots_of_both_classes"]:
                runs.append([])
            runs[-1].append(number)
        if epoch:
            random.Random(f"{seed}/order/{epoch}").shuffle(runs)
        return [number for run in runs for number in run]

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write what was trained, in the form that is used afterwards.

        Args:
            about: remembered beside: the backbone's name, the revision of the code, metrics.
        """
        save_parameters(self, folder, about)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class Plain(Method):
    """Demonstrations written out in full before a frozen model: what every method is compared with."""

    writes_turns_apart: ClassVar[bool] = True


def episode_turns(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of an EPISODE row."""
    return [
        Turn(
            () if turn["picture"] is None else (turn["picture"],),
            turn["question"],
            turn["answer"],
            turn["scored"],
        )
        for turn in row["turns"]
    ]

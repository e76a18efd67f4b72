"""MMICT: demonstrations and queries through one M-Hub (Chen et al., TOMM 2024, arXiv:2312.06363).

Both are read by the same module (`mmicl_core.methods.hub`) in the same call, and differ in what is kept: of
a demonstration its text as guided by its picture, of the query its picture as guided by the question. The
frozen language model sees no picture, only these soft tokens and the words of the query:

    Z_s = hub(question and answer s, picture s) at the text          T_s tokens, and a separator
    V   = hub(question, picture) at the queries                      Q tokens, where the picture stands
    loss = -log p(answer | Z_1; Z_2; .. Z_S; V, question)

Trained: the hub with its norm and its projection, 187 M beside FlanT5-XL. The four designs that
`demonstrations` names differ in what of a demonstration is kept.

Open, and settled here: text is tokenised as the language model's, unless the backbone, or what the hub begins
as, is a Q-Former with a tokenizer; a question and its answer are joined by a space. A text that is too long
loses its beginning, so that a demonstration keeps its answer. Several pictures of a turn are seen as one, as
the frames of a video are. A query without a picture has no visual tokens. The released code also attends to
padded text, and has no way to answer behind demonstrations.

Demonstrations never see each other or the query: what becomes of a turn must not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.config.model import MmictConfig
from mmicl_core.data.collate import Packed, pack
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.methods.adapter import CONFIG_FILE, load_parameters
from mmicl_core.methods.base import ONE_BY_ONE, Method, Pictures, Side
from mmicl_core.methods.hub import Hub
from mmicl_core.methods.qformer import SOURCES, TOKENIZER_FOLDER, copy_qformer, hub_tokenizer
from mmicl_core.prompts import IMAGE, Piece, Prompt, Turn

__all__ = ["Mmict", "MmictBatch", "Shown"]


@dataclass(frozen=True)
class Shown:
    """N turns as the hub takes them, side by side."""

    ids_NT: Tensor
    text_NT: Tensor
    """True where there is text."""
    kept_NL: Tensor
    """True where a soft token is kept, of Q queries, T of text and a separator."""
    pictures: tuple[PreparedPicture, ...]
    """Each once, however many turns show it."""
    seen: tuple[tuple[int, ...], ...]
    """Of each turn, which of them it shows to the hub."""


@dataclass(frozen=True)
class MmictBatch:
    """Prompts with places for the soft tokens of their turns."""

    packed: Packed
    shown: Shown

    @property
    def num_scored(self) -> int:
        """Answer tokens."""
        return self.packed.num_scored


class Mmict(Method):
    """Trains the hub: answers behind soft tokens, through the frozen language model."""

    takes: ClassVar[Literal["tower_states"]] = "tower_states"

    def __init__(self, backbone: HuggingFaceBackbone, config: MmictConfig) -> None:
        super().__init__(backbone)
        self.config, self._cut_texts = config, 0
        start = Path(config.start) if config.start is not None else None
        self.tokenizer = hub_tokenizer(backbone, start)
        self.hub = Hub(
            config,
            vocabulary=len(self.tokenizer),
            vision_width=backbone.vision_width,
            width=backbone.width,
            normalised=backbone.family.model_type in SOURCES,
            spread=backbone.embedding_spread(),
        )
        if start is not None and (start / CONFIG_FILE).is_file():
            load_parameters(self, start)
        elif start is not None:
            copy_qformer(self.hub, config, start)

    def arrange(
        self, conversations: Sequence[Sequence[Turn]], pictures: Pictures, side: Side = "right"
    ) -> MmictBatch:
        """Turns -> places for soft tokens and the words of queries, and what the hub reads for them."""
        prompts, turns, asked = list[Prompt](), list[Turn](), list[bool]()
        for *before, query in conversations:
            demonstrations = before if self.config.demonstrations != "none" else []
            places = [Piece("fused") for _ in demonstrations]
            prompts.append([*self.chat.prefix(), *places, *self._query(query)])
            turns += [*demonstrations, query]
            asked += [False] * len(demonstrations) + [True]
        shown = self._show(turns, asked, pictures)
        lengths = [kept for kept in shown.kept_NL.sum(1).tolist() if kept]
        packed = pack(prompts, fused_tokens=lengths, padding_id=self.padding_id, side=side)
        return MmictBatch(packed, shown)

    @property
    def cut(self) -> Mapping[str, int]:
        """Texts that were longer than the hub reads."""
        return {"texts": self._cut_texts} if self._cut_texts else {}

    def demonstration_tokens(self, turn: Turn, pictures: Pictures) -> int:
        """Positions of a prompt that one demonstration takes, its separator with it."""
        if self.config.demonstrations == "none":
            return 0
        if self.config.demonstrations == "image":
            return self.config.queries + 1
        (ids,) = self._tokens([_text(turn, is_query=False)])
        return len(self._cut(ids)) + 1

    def embed(self, batch: MmictBatch) -> Embedded:
        """Soft tokens at their places."""
        device, shown = self.backbone.device, batch.shown
        states_NRW, seen_NR = self._look(shown)
        read = (shown.ids_NT, shown.text_NT, states_NRW, seen_NR, shown.kept_NL)
        return self.backbone.embed(
            batch.packed.to(device), fused=self.hub(*(part.to(device) for part in read))
        )

    def calls(self, batch: MmictBatch) -> Mapping[str, int]:
        """How many pictures the vision tower looks at."""
        name = "pictures" if self.backbone.family.one_size else ONE_BY_ONE
        return {name: max(1, len(batch.shown.pictures)) if self.looks else 0}

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the hub, and its tokenizer unless that is the backbone's."""
        super().save(folder, about)
        if self.tokenizer is not self.backbone.tokenizer:
            self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)

    def _query(self, query: Turn) -> Iterator[Piece]:
        """The words of a turn, and one place for its visual tokens, where the first picture stands."""
        pieces = self.chat.turn(query)
        first = next((number for number, piece in enumerate(pieces) if piece.kind == IMAGE), None)
        for number, piece in enumerate(pieces):
            if piece.kind == "text":
                yield piece
            elif number == first:
                yield Piece("fused")

    def _show(self, turns: Sequence[Turn], asked: Sequence[bool], pictures: Pictures) -> Shown:
        design, both = self.config.demonstrations, list(zip(turns, asked, strict=True))
        ids = self._tokens([_text(turn, is_query) for turn, is_query in both])
        self._cut_texts += sum(len(some) > self.config.longest_text for some in ids)
        cut = [torch.tensor(self._cut(some), dtype=torch.long) for some in ids]
        # One column at least, so that every worker runs the modules that read text.
        ids_NT = pad_sequence([*cut, torch.zeros(1, dtype=torch.long)], batch_first=True)[:-1]
        text_NT = _reaches(cut, ids_NT.shape[1])
        queries = [bool(turn.pictures) if is_query else design == "image" for turn, is_query in both]
        texts = [not is_query and design != "image" for is_query in asked]
        kept = (
            torch.tensor(queries)[:, None].expand(-1, self.config.queries),
            torch.tensor(texts)[:, None] & text_NT,
            ~torch.tensor(asked)[:, None],
        )
        keys = [turn.pictures if is_query or design != "text" else () for turn, is_query in both]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(chain(*keys)))}
        seen = tuple(tuple(numbers[key] for key in some) for some in keys)
        return Shown(ids_NT, text_NT, torch.cat(kept, dim=1), tuple(pictures[key] for key in numbers), seen)

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        # The tokens that BERT begins and ends a text with belong to it; those of a language model to prompts.
        own = self.tokenizer is self.backbone.tokenizer
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=not own)["input_ids"]
        return ids

    def _cut(self, ids: Sequence[int]) -> Sequence[int]:
        """At most `longest_text` ids: the last ones, and the first where it marks the beginning."""
        over = len(ids) - self.config.longest_text
        if over <= 0:
            return ids
        marks = int(self.tokenizer is not self.backbone.tokenizer)
        return [*ids[:marks], *ids[over + marks :]]

    @torch.no_grad()
    def _look(self, shown: Shown) -> tuple[Tensor, Tensor]:
        """States of the pictures of each turn, side by side, and where there are any."""
        # Where no turn shows any, a blank one, as other workers may have pictures.
        pictures = shown.pictures or ((self.blank_picture,) if self.looks else ())
        known = self.backbone.vision.tower_states(pictures) if pictures else []
        nothing = torch.zeros(1, self.backbone.vision_width, device=self.backbone.device)
        states = [torch.cat([known[number] for number in some]) if some else nothing for some in shown.seen]
        dtype = next(self.hub.parameters()).dtype
        states_NRW = pad_sequence([some.to(dtype) for some in states], batch_first=True)
        return states_NRW, _reaches(states, states_NRW.shape[1])


def _text(turn: Turn, is_query: bool) -> str:
    """What the hub reads: of the query its question, of a demonstration its answer too."""
    answer = None if is_query else turn.answer
    return " ".join(part for part in (turn.question, answer) if part)


def _reaches(rows: Sequence[Tensor], longest: int) -> Tensor:
    """Which of `longest` places each row reaches, (rows, longest)."""
    return torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]

"""MTV: demonstrations as mean activations of some heads (Huang et al., NeurIPS 2024, arXiv:2406.15334).

A baseline that trains no weights. What each head gives at the last token of prompts with demonstrations is
averaged; which heads carry the task is found by REINFORCE; a query then stands alone in its prompt, and these
heads give their means at its last token:

    mu = mean of h(last token of [demonstrations; query])                      means_KHE
    z ~ Bernoulli(sigmoid(theta)), one theta for each head, -1 at the start    chosen_SKH
    r(z) = log p(first token of the answer | query, heads of z give mu)        of one query and S sets a step
    theta <- Adam along sum over z of (r(z) - mean r) / std r * d log p(z) / d theta
    z* = the best of ten last sets, by mean r over fifty queries               selected_KH

Shapes (letters in `mmicl_core.shapes`): K layers of H heads, each E wide; S sets of heads.

Left open, and settled here: the search has queries of training episodes that no mean was made of (the
released code draws both from the same). Heads give their means while the prompt is read, as in the search;
later tokens are decoded from its cache (the released code goes on replacing). In an encoder-decoder the heads
are those of the decoder's cross-attention, at the decoder's first token. The means go in before the output
projection, whose bias thus stays (the released code loses it).

Means are of one task: what differs between prompts, such as names made up for each episode, is averaged away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmicl_core.backbones.heads import Heads
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.config.model import MtvConfig
from mmicl_core.data.collate import Packed
from mmicl_core.errors import DataError
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Method, Pictures, PromptBatch, Side, episode_turns
from mmicl_core.prompts import Turn

__all__ = ["Mtv", "select_heads"]

Rows = Sequence[Mapping[str, Any]]

FIRST_LOGIT = -1.0
# Probabilities keep this distance from 0 and 1 while heads are searched, so that every head is still tried.
EPSILON = 1e-3
CANDIDATES, JUDGES = 10, 50


class Mtv(Method):
    """Answers queries alone, with the means of demonstrations in some heads.

    Its state is found by `fit`, not by gradients, and kept as other methods keep what they train. Before that
    no head is selected, and queries are answered as by the plain model.
    """

    def __init__(self, backbone: HuggingFaceBackbone, config: MtvConfig) -> None:
        super().__init__(backbone)
        self.config = config
        self.heads = Heads(backbone)
        means_KHE = torch.zeros(self.heads.shape, device=backbone.device)
        self.means_KHE = nn.Parameter(means_KHE, requires_grad=False)
        self.selected_KH = nn.Parameter(torch.zeros_like(means_KHE[..., 0]), requires_grad=False)
        if config.start is not None:
            load_parameters(self, Path(config.start))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Means and selection, which no gradient reaches."""
        return {"means_KHE": self.means_KHE, "selected_KH": self.selected_KH}

    def arrange(
        self, conversations: Sequence[Sequence[Turn]], pictures: Pictures, side: Side = "right"
    ) -> PromptBatch:
        """Queries alone."""
        return self.lay_out([turns[-1:] for turns in conversations], pictures, side)

    def applied(self, prompts: Embedded) -> AbstractContextManager[None]:
        """The first pass inside, which must be over `prompts`, has the means in the selected heads."""
        return self.heads.replace(prompts, self.means_KHE, self.selected_KH)

    def demonstration_tokens(self, turn: Turn, pictures: Pictures) -> int:
        """Demonstrations take no positions of a prompt."""
        return 0

    @torch.no_grad()
    def fit(
        self, rows: Rows, pictures: Pictures, *, seed: int, progress: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Average activations over some episodes, and search for heads with the queries of the others.

        Args:
            rows: EPISODE rows whose queries are answered.
            seed: determines which episodes are averaged, and the search.
            progress: told the number of finished steps of the search.

        Returns:
            Numbers of heads and of those selected, and the mean loss of the first answer token with and
            without them, over the queries that chose them (in nats).

        Raises:
            DataError: there are too few episodes.
        """
        generator = torch.Generator().manual_seed(seed)
        averaged, held_back = self._divide(rows, generator)
        self.means_KHE.copy_(self._means(averaged, pictures))

        def losses_of(chosen_SKH: Tensor, query: int) -> Tensor:
            return self._first_token_nll(held_back[query], pictures, chosen_SKH)

        shape = self.heads.shape[:2]
        selected_KH = select_heads(losses_of, len(held_back), shape, self.config, generator, progress)
        self.selected_KH.copy_(selected_KH)
        both_SKH = torch.stack([selected_KH, torch.zeros(shape)])
        loss, loss_without = _judge(losses_of, len(held_back), both_SKH).tolist()
        counts = {"heads": selected_KH.numel(), "selected": int(selected_KH.sum())}
        return counts | {"loss": loss, "loss_without": loss_without}

    def _divide(self, rows: Rows, generator: torch.Generator) -> tuple[Rows, Rows]:
        """Episodes to average over, and all others."""
        order = torch.randperm(len(rows), generator=generator).tolist()
        fitting = [number for number in order if len(rows[number]["turns"]) == self.config.shots + 1]
        averaged = fitting[: self.config.prompts]
        used = set(averaged)
        held_back = [number for number in order if number not in used]
        if len(averaged) < self.config.prompts or not held_back:
            raise DataError(
                f"method.prompts ({self.config.prompts}) needs as many episodes of method.shots "
                f"({self.config.shots}) demonstrations and more for the search, but of {len(rows)} episodes "
                f"{len(fitting)} are such: draw more of them, or lower method.prompts"
            )
        return [rows[number] for number in averaged], [rows[number] for number in held_back]

    def _means(self, rows: Rows, pictures: Pictures) -> Tensor:
        total_KHE = torch.zeros_like(self.means_KHE)
        for first in range(0, len(rows), self.config.batch):
            conversations = [_asking(row) for row in rows[first : first + self.config.batch]]
            batch = self.lay_out(conversations, pictures)
            prompts = self.embed(batch)
            with self.heads.read(prompts) as seen:
                self.backbone.answer_nll(prompts, batch.packed.to(self.backbone.device))
            total_KHE += torch.stack([given_BHE.float().sum(0) for given_BHE in seen])
        return total_KHE / len(rows)

    @torch.no_grad()
    def _first_token_nll(self, row: Mapping[str, Any], pictures: Pictures, chosen_SKH: Tensor) -> Tensor:
        """Of one query's answer under each set of heads, (S,): the query S times in a batch, seen once."""
        batch = self.collate([row], pictures, None)
        packed, losses_S = batch.packed.to(self.backbone.device), list[Tensor]()
        visual = self.backbone.see(batch.pictures)
        for chosen in torch.split(chosen_SKH.to(self.backbone.device), self.config.batch):
            copies = Packed(**{name: rows.repeat(len(chosen), 1) for name, rows in vars(packed).items()})
            seen = visual if visual is None else visual.repeat(len(chosen), 1)
            prompts = self.backbone.embed(copies, seen)
            with self.heads.replace(prompts, self.means_KHE, chosen):
                nll = self.backbone.answer_nll(prompts, copies)
            losses_S.append(nll.view(len(chosen), -1)[:, 0])
        return torch.cat(losses_S)


def _asking(row: Mapping[str, Any]) -> list[Turn]:
    """Demonstrations and query, of which the query's answer alone counts: a prompt ends before that."""
    *demonstrations, query = episode_turns(row)
    return [*(replace(turn, scored=False) for turn in demonstrations), replace(query, scored=True)]


@torch.enable_grad()
def select_heads(
    losses_of: Callable[[Tensor, int], Tensor],
    queries: int,
    shape: tuple[int, int],
    config: MtvConfig,
    generator: torch.Generator,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Search for the heads with which answers are likeliest, by REINFORCE.

    Args:
        losses_of: sets of heads (S, K, H), 1 for those in a set, and the number of a query -> losses (S,).
        queries: how many there are.
        shape: K, H.
        progress: told the number of finished steps.

    Returns:
        (K, H), 1 for heads that are selected.
    """
    logits_KH = torch.full(shape, FIRST_LOGIT, requires_grad=True)
    optimizer = torch.optim.Adam([logits_KH], lr=config.learning_rate)
    for step in range(config.steps):
        query = int(torch.randint(queries, (), generator=generator))
        probability_KH = logits_KH.sigmoid().clamp(EPSILON, 1 - EPSILON)
        chosen_SKH = _draw(probability_KH, config.samples, generator)
        losses_S = losses_of(chosen_SKH, query).detach().float().cpu()
        standard_S = (losses_S - losses_S.mean()) / (losses_S.std() + EPSILON)
        log_SKH = torch.where(chosen_SKH == 1, probability_KH.log(), (1 - probability_KH).log())
        # Adam goes down, so losses stand where rewards would be climbed.
        objective = (standard_S * log_SKH.sum((1, 2))).sum()
        (logits_KH.grad,) = torch.autograd.grad(objective, logits_KH)
        optimizer.step()
        if progress is not None:
            progress(step + 1)
    candidates_SKH = _draw(logits_KH.sigmoid(), CANDIDATES, generator)
    return candidates_SKH[_judge(losses_of, queries, candidates_SKH).argmin()]


def _draw(probability_KH: Tensor, sets: int, generator: torch.Generator) -> Tensor:
    return torch.bernoulli(probability_KH.detach().expand(sets, -1, -1), generator=generator)


def _judge(losses_of: Callable[[Tensor, int], Tensor], queries: int, chosen_SKH: Tensor) -> Tensor:
    """The mean loss of each set over the first queries, (S,)."""
    losses = [losses_of(chosen_SKH, query).cpu() for query in range(min(queries, JUDGES))]
    return torch.stack(losses).mean(0)

"""The M-Hub: one instructed Q-Former for demonstrations and queries (Chen et al., TOMM 2024, 2312.06363).

Learnt queries and a text stand side by side. In every layer each attends to all of them; in every second
layer, from the first, the queries alone attend to the states of a picture. What a picture shows thus reaches
the text through the queries, and what the text says changes what the queries look for:

    states (R, W) --norm--> --cross-attention--> [queries; text] --projection--> soft tokens (Q + T, D)

Behind the queries stand Q textual-guided visual features, behind the text T visual-guided textual ones; who
calls says which are kept. Shapes (letters in `mmicl_core.shapes`): N turns of Q queries and at most T text
tokens, with at most R states of their pictures. The Q-Former is the one of `transformers`.

A turn without a picture looks at one state of zeros: behind the norm that is a trained vector, and no softmax
meets an empty row. The paper's separator of demonstrations, `<|endofchunk|>`, is in the released code a row
of the frozen vocabulary that nobody trained; here it is one trained vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from mmicl_core.config.model import MmictConfig

__all__ = ["Hub"]

POSITIONS = 512
# BERT's initial weights and the width that they are for.
BERT_SPREAD, BERT_WIDTH = 0.02, 768


class ScaleShift(nn.Module):
    """Scale and shift of each channel, at first the identity.

    The vision tower of a Q-Former ends in the LayerNorm that is trained beside the hub. It is frozen with the
    tower here, and what these two learn is the same as if its own were trained.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """(..., W) -> (..., W)."""
        return states * self.scale + self.shift


class Hub(nn.Module):
    """Queries, Q-Former and projection, with the normalisation before and the separator behind.

    Args:
        vocabulary: of the tokenizer that makes the text.
        vision_width: W.
        width: D.
        normalised: the states come out of a LayerNorm that was trained for a Q-Former.
        spread: of the token embeddings that soft tokens stand among, which training begins at.
    """

    def __init__(
        self,
        config: MmictConfig,
        *,
        vocabulary: int,
        vision_width: int,
        width: int,
        normalised: bool = False,
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm: nn.Module = ScaleShift(vision_width) if normalised else nn.LayerNorm(vision_width)
        # What a layer adds is then of one size at any width.
        initial = BERT_SPREAD * (BERT_WIDTH / config.width) ** 0.5
        self.queries = nn.Parameter(torch.empty(1, config.queries, config.width))
        nn.init.normal_(self.queries, std=initial)
        settings = InstructBlipQFormerConfig(
            vocab_size=vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=POSITIONS,
            # Padding is masked, and a tokenizer may pad with a token that means something elsewhere.
            pad_token_id=None,
            initializer_range=initial,
            encoder_hidden_size=vision_width,
        )
        self.qformer: Any = InstructBlipQFormerModel(settings)
        # What the Q-Former gives is normalised, so these weights make tokens of that spread.
        self.projection = nn.Linear(config.width, width)
        nn.init.normal_(self.projection.weight, std=spread / config.width**0.5)
        nn.init.zeros_(self.projection.bias)
        self.separator = nn.Parameter(torch.empty(1, 1, width))
        nn.init.normal_(self.separator, std=spread)
        self._freeze_unread(config)

    def forward(
        self, ids_NT: Tensor, text_NT: Tensor, states_NRW: Tensor, seen_NR: Tensor, kept_NL: Tensor
    ) -> Tensor:
        """The soft tokens that are kept, turn after turn, (number of them, D).

        Args:
            text_NT: True where there is text.
            seen_NR: True where there is a state; there is one in each row.
            kept_NL: True where a soft token is kept, of L = Q + T + 1: queries, text, separator.
        """
        turns = len(ids_NT)
        queries = self.queries.expand(turns, -1, -1)
        hidden = self.qformer(
            input_ids=ids_NT,
            attention_mask=torch.cat([text_NT.new_ones(queries.shape[:2]), text_NT], dim=1),
            query_embeds=queries,
            encoder_hidden_states=self.norm(states_NRW),
            encoder_attention_mask=seen_NR,
        ).last_hidden_state
        soft_NLD = self.projection(hidden)
        separator = self.separator.to(soft_NLD.dtype).expand(turns, -1, -1)
        return torch.cat([soft_NLD, separator], dim=1)[kept_NL]

    def _freeze_unread(self, config: MmictConfig) -> None:
        # The biases of keys learn nothing either, as they move no softmax; published weights have them.
        if config.demonstrations in ("image", "none"):
            # No text is kept, so nothing reads what the last layer makes of it by itself.
            last = self.qformer.encoder.layer[-1]
            for module in (last.intermediate, last.output):
                module.requires_grad_(requires_grad=False)
        self.separator.requires_grad_(config.demonstrations != "none")

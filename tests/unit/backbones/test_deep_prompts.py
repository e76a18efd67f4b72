from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.pixtral.modeling_pixtral import generate_block_attention_mask

from mmicl_core.backbones.deep_prompts import (
    class_states,
    prompts_before_pictures,
    prompts_beside_states,
    soft_tokens_replaced,
)
from mmicl_core.backbones.families import vision_blocks_read
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.errors import BackboneError
from tests.fakes import tiny_backbone
from tests.families import write_model

# 32-bit sums in another order differ in the last bits; states are of the order of 1.
LAST_BITS = {"atol": 1e-5, "rtol": 1e-4}
PROMPTS = 3


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceBackbone]:
    root = tmp_path_factory.mktemp("families")

    def load(name: str) -> HuggingFaceBackbone:
        write_model(name, root / name)
        return load_backbone(root / name)

    return {name: load(name) for name in ("qwen2_5_vl", "mistral3", "idefics2")}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts_of(backbone: HuggingFaceBackbone, length: int, seed: int = 0) -> Embedded:
    ones = torch.ones(1, length, dtype=torch.long)
    none = torch.zeros(1, length, dtype=torch.bool)
    return Embedded(
        random(1, length, backbone.width, seed=seed), ones, none, none, torch.arange(length)[None]
    )


def padded(prompts: Embedded, count: int) -> Embedded:
    """The same with padding on the left."""
    behind = prompts.after(torch.zeros(count, prompts.embeds_BLD.shape[-1]))
    mask = behind.mask_BL.clone()
    mask[:, :count] = 0
    positions = (behind.positions - count).clamp(min=0)
    return Embedded(behind.embeds_BLD, mask, behind.image_BL, behind.answer_BL, positions)


def read_by_hand(backbone: HuggingFaceBackbone, prompts: Embedded, soft_KSD: Tensor) -> Tensor:
    """One prompt through a LLaMA whose every layer has its first states overwritten before it runs."""
    model, count = backbone.language_model, soft_KSD.shape[1]
    hidden = torch.cat([torch.zeros(1, count, backbone.width), prompts.embeds_BLD], dim=1)
    length = hidden.shape[1]
    rotations = model.rotary_emb(hidden, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for layer, soft_SD in zip(model.layers, soft_KSD, strict=True):
        hidden = torch.cat([soft_SD[None], hidden[:, count:]], dim=1)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotations)
    return model.norm(hidden)[:, count:]


def test_language_model_reads_as_if_every_layer_were_run_by_hand_with_its_own_soft_tokens() -> None:
    backbone = tiny_backbone()
    prompts = prompts_of(backbone, 7)
    soft_KSD = random(2, PROMPTS, backbone.width, seed=1)
    with torch.no_grad():
        ours = backbone.read(prompts.after(soft_KSD[0], soft_KSD[1:])).last_hidden_state[:, PROMPTS:]
        torch.testing.assert_close(ours, read_by_hand(backbone, prompts, soft_KSD), **LAST_BITS)
        # Padding stays outside of the soft tokens.
        left = padded(prompts, 4).after(soft_KSD[0], soft_KSD[1:])
        hidden = backbone.read(left).last_hidden_state[:, PROMPTS + 4 :]
        torch.testing.assert_close(hidden, ours, **LAST_BITS)


def test_equal_soft_tokens_of_the_first_layer_alone_are_those_of_prompt_tuning() -> None:
    backbone = tiny_backbone()
    prompts, soft_SD = prompts_of(backbone, 7), random(PROMPTS, backbone.width, seed=1)
    with torch.no_grad():
        plain = backbone.read(prompts.after(soft_SD), output_hidden_states=True)
        again = prompts.after(soft_SD, plain.hidden_states[1][0, :PROMPTS][None])
        torch.testing.assert_close(
            backbone.read(again).last_hidden_state, plain.last_hidden_state, **LAST_BITS
        )


def test_hooks_are_gone_after_the_pass_also_when_it_fails() -> None:
    backbone = tiny_backbone()
    soft_KSD = random(2, PROMPTS, backbone.width)
    prompts = prompts_of(backbone, 5).after(soft_KSD[0], soft_KSD[1:])
    blocks = [*backbone.layers, *(backbone.vision_layers or ()), backbone.projector]
    before = [len(block._forward_pre_hooks) + len(block._forward_hooks) for block in blocks]
    backbone.read(prompts)
    with (
        pytest.raises(RuntimeError, match="stop"),
        soft_tokens_replaced(backbone.layers, prompts),
        prompts_before_pictures(backbone.vision_layers, random(2, 1, 32), one_sequence=False),
        prompts_beside_states(backbone.projector, random(1, 32)),
        class_states(backbone.vision_layers[0]),
    ):
        raise RuntimeError("stop")
    after = [len(block._forward_pre_hooks) + len(block._forward_hooks) for block in blocks]
    assert after == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    backbone = tiny_backbone()
    soft_KSD = random(2, PROMPTS, backbone.width, seed=1).requires_grad_()
    prompts = prompts_of(backbone, 7)
    expected = torch.autograd.grad(read_by_hand(backbone, prompts, soft_KSD).square().sum(), soft_KSD)[0]
    backbone.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    # The library checkpoints blocks only while they are in training; these have no dropout.
    for block in backbone.layers:
        block.training = True
    runs: list[Tensor] = []
    backbone.layers[1].input_layernorm.register_forward_hook(lambda _, given, output: runs.append(output))
    hidden = backbone.read(prompts.after(soft_KSD[0], soft_KSD[1:])).last_hidden_state
    hidden[:, PROMPTS:].square().sum().backward()
    # Once forward, once again backward.
    assert len(runs) == 2
    torch.testing.assert_close(soft_KSD.grad, expected, **LAST_BITS)


@pytest.mark.parametrize("kind", ["none", "bool", "added", "one query"])
def test_pictures_side_by_side_are_read_as_each_alone_behind_its_prompts(
    towers: dict[str, HuggingFaceBackbone], kind: str
) -> None:
    backbone = towers["idefics2"]
    block, width = backbone.vision_layers[0], backbone.vision_width
    states_NRW, prompts_SW = random(2, 6, width), random(PROMPTS, width, seed=1)
    lengths = (6, 6) if kind == "none" else (6, 4)
    real = torch.arange(6) < torch.tensor(lengths)[:, None]
    mask: Any = {
        "none": None,
        "bool": real[:, None, None].expand(-1, 1, 6, -1),
        "added": torch.zeros(2, 1, 6, 6).masked_fill(~real[:, None, None], torch.finfo().min),
        "one query": real[:, None, None],
    }[kind]
    with torch.no_grad():
        with prompts_before_pictures([block], [prompts_SW], one_sequence=False):
            together = block(states_NRW, mask)
        for ours, states_RW, length in zip(together, states_NRW, lengths, strict=True):
            alone = block(torch.cat([prompts_SW, states_RW[:length]])[None], None)[0, PROMPTS:]
            torch.testing.assert_close(ours[:length], alone, **LAST_BITS)


@pytest.mark.parametrize("lengths", [(4, 8, 2), (14,)])
def test_stretches_of_one_sequence_are_read_as_each_alone_behind_its_prompts(
    towers: dict[str, HuggingFaceBackbone], lengths: tuple[int, ...]
) -> None:
    for name in ("qwen2_5_vl", "mistral3"):
        backbone = towers[name]
        block, width = backbone.vision_layers[0], backbone.vision_width
        heads = 3 if name == "qwen2_5_vl" else 2
        angles = random(sum(lengths), width // heads, seed=2)
        states_RW, prompts_SW = random(sum(lengths), width), random(PROMPTS, width, seed=1)
        with torch.no_grad():
            with prompts_before_pictures([block], [prompts_SW], one_sequence=True):
                together = run_stretches(name, block, states_RW, angles, lengths)
            alone = []
            for states, angle in zip(states_RW.split(lengths), angles.split(lengths), strict=True):
                longer = torch.cat([prompts_SW, states])
                # An angle of 0 does not turn.
                turned = torch.cat([torch.zeros(PROMPTS, angle.shape[1]), angle])
                alone.append(run_stretches(name, block, longer, turned, (len(longer),))[PROMPTS:])
        torch.testing.assert_close(together, torch.cat(alone), **LAST_BITS)


def run_stretches(
    name: str, block: nn.Module, states_RW: Tensor, angles: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    rotations = (angles.cos(), angles.sin())
    if name == "qwen2_5_vl":
        bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return block(states_RW, cu_seqlens=bounds, position_embeddings=rotations, max_seqlen=max(lengths))
    mask = generate_block_attention_mask(lengths, states_RW[None])
    return block(states_RW[None], mask, position_embeddings=rotations)[0]


def test_bounds_and_the_longest_stretch_are_told_to_attention_code_that_asks() -> None:
    class Recorder(nn.Module):
        def forward(self, hidden_states: Tensor, position_embeddings: Any, **told: Any) -> Tensor:
            self.told = told
            return hidden_states

    block, states_RW = Recorder(), random(1, 9, 8)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    with prompts_before_pictures([block], [random(PROMPTS, 8, seed=1)], one_sequence=True):
        given = block(states_RW, position_embeddings=(random(9, 4), random(9, 4)), **told)
    torch.testing.assert_close(given, states_RW, rtol=0, atol=0)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert block.told[name].dtype == torch.int32
        assert block.told[name].tolist() == [0, 4 + PROMPTS, 9 + 2 * PROMPTS]
    assert block.told["max_length_q"] == block.told["max_length_k"] == 5 + PROMPTS


def test_resampler_reads_prompts_as_if_they_were_states_of_the_picture(
    towers: dict[str, HuggingFaceBackbone], tmp_path: Path
) -> None:
    connector, width = towers["idefics2"].projector, towers["idefics2"].vision_width
    states_NRW, prompts_SW = random(2, 5, width), random(PROMPTS, width, seed=1)
    longer = torch.cat([states_NRW, prompts_SW.expand(2, -1, -1)], dim=1)
    seen = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        with prompts_beside_states(connector, prompts_SW):
            ours = connector(states_NRW, attention_mask=seen)
        theirs = connector(longer, attention_mask=torch.cat([seen, torch.ones(2, PROMPTS) > 0], dim=1))
    torch.testing.assert_close(ours, theirs, **LAST_BITS)
    write_model("blip_2_opt", tmp_path)
    backbone = load_backbone(tmp_path)
    qformer, queries = backbone.projector, backbone.model.query_tokens.expand(2, -1, -1)
    with torch.no_grad():
        given = {"query_embeds": queries, "encoder_attention_mask": torch.ones(2, 5)}
        with prompts_beside_states(qformer, prompts_SW):
            ours = qformer(**given, encoder_hidden_states=states_NRW).last_hidden_state
        given["encoder_attention_mask"] = torch.ones(2, 5 + PROMPTS)
        theirs = qformer(**given, encoder_hidden_states=longer).last_hidden_state
    torch.testing.assert_close(ours, theirs, **LAST_BITS)


@pytest.mark.parametrize(
    ("read", "blocks"), [(-1, 24), (-2, 23), (0, 0), (20, 20), ([-24, -20, -1], 24), ([3, -3], 22)]
)
def test_blocks_before_the_states_that_are_read_are_counted_from_either_end(read: Any, blocks: int) -> None:
    assert vision_blocks_read(SimpleNamespace(vision_feature_layer=read), 24) == blocks


def test_states_that_a_tower_does_not_have_are_refused_with_both_numbers() -> None:
    with pytest.raises(BackboneError, match=r"names the hidden states \[-26\], the vision tower has 25"):
        vision_blocks_read(SimpleNamespace(vision_feature_layer=-26), 24)
    assert vision_blocks_read(SimpleNamespace(), 24) == 24

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmicl_core.backbones.decoding import generate
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, backbone_identity, load_backbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.backbones.vision import join
from mmicl_core.data.pictures import VISUAL
from mmicl_core.errors import BackboneError
from tests.fakes import draw_picture, tiny_backbone
from tests.families import write_model

NEW_TOKENS = 12
# 32-bit sums in another order differ in the last bits; hidden states are of the order of 1.
LAST_BITS = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def backbone() -> HuggingFaceBackbone:
    return tiny_backbone()


def _prompts(backbone: HuggingFaceBackbone, lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, backbone.width, generator=generator) for length in lengths]


def _embedded(embeds: Tensor, mask: Tensor) -> Embedded:
    """Prompts of which nothing is a picture and nothing is scored."""
    nothing = torch.zeros_like(mask, dtype=torch.bool)
    return Embedded(embeds, mask, nothing, nothing, (mask.cumsum(1) - 1).clamp(min=0))


def _left_padded(prompts: list[Tensor]) -> Embedded:
    longest = max(map(len, prompts))
    embeds = torch.full((len(prompts), longest, prompts[0].shape[1]), 9.0)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return _embedded(embeds, mask)


def _argmax_by_hand(backbone: HuggingFaceBackbone, prompt: Tensor, end: int) -> list[int]:
    """Greedy decoding that reads the whole prompt again for every token."""
    embeds, chosen = prompt[None], list[int]()
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            mask = torch.ones(1, embeds.shape[1], dtype=torch.long)
            hidden = backbone.read(_embedded(embeds, mask)).last_hidden_state
            token = int(backbone.logits(hidden[:, -1]).argmax())
            word = backbone.model.get_input_embeddings()(torch.tensor([[token]]))
            embeds = torch.cat([embeds, word], dim=1)
        if token == end:
            break
        chosen.append(token)
    return chosen


def test_greedy_generation_equals_the_largest_score_step_by_step(backbone: HuggingFaceBackbone) -> None:
    for prompt in _prompts(backbone, [3, 9, 20]):
        (answer,) = generate(backbone, _left_padded([prompt]), NEW_TOKENS)
        assert answer == _argmax_by_hand(backbone, prompt, backbone.tokenizer.eos_token_id)
        assert len(set(answer)) > 1


def test_greedy_generation_equals_that_of_the_stock_model(backbone: HuggingFaceBackbone) -> None:
    for prompt in _prompts(backbone, [3, 9, 20]):
        embedded = _left_padded([prompt])
        stock = backbone.model.generate(
            inputs_embeds=embedded.embeds_BLD,
            attention_mask=embedded.mask_BL,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=backbone.tokenizer.pad_token_id,
            eos_token_id=backbone.tokenizer.eos_token_id,
        )
        (answer,) = generate(backbone, embedded, NEW_TOKENS)
        assert answer == [token for token in stock[0].tolist() if token != backbone.tokenizer.eos_token_id]


def test_generation_of_a_left_padded_batch_equals_that_of_single_prompts(
    backbone: HuggingFaceBackbone,
) -> None:
    prompts = _prompts(backbone, [3, 9, 20, 1])
    together = generate(backbone, _left_padded(prompts), NEW_TOKENS)
    assert together == [generate(backbone, _left_padded([prompt]), NEW_TOKENS)[0] for prompt in prompts]


def test_generation_cuts_the_end_token_and_what_follows(backbone: HuggingFaceBackbone) -> None:
    prompts = _prompts(backbone, [5, 11])
    whole = generate(backbone, _left_padded(prompts), NEW_TOKENS)
    # Any token may play the end: here one that the first answer meets in its middle.
    end = whole[0][NEW_TOKENS // 2]
    tokens = SimpleNamespace(pad_token_id=0, eos_token_id=end)
    other = HuggingFaceBackbone(backbone.model, SimpleNamespace(tokenizer=tokens), "another end")
    cut = generate(other, _left_padded(prompts), NEW_TOKENS)
    assert cut[0] == whole[0][: whole[0].index(end)]
    assert cut[1] == (whole[1][: whole[1].index(end)] if end in whole[1] else whole[1])


def test_hidden_states_do_not_depend_on_the_side_of_padding(backbone: HuggingFaceBackbone) -> None:
    prompts = _left_padded(_prompts(backbone, [4, 10]))
    embeds, mask = prompts.embeds_BLD, prompts.mask_BL
    left = backbone.read(prompts).last_hidden_state
    right = backbone.read(_embedded(embeds.flip(0).roll(-6, 1)[1:], mask[:1].flip(1))).last_hidden_state
    torch.testing.assert_close(left[0, 6:], right[0, :4], **LAST_BITS)


def test_vision_tower_and_projector_give_what_the_stock_model_gives(backbone: HuggingFaceBackbone) -> None:
    pictures = [draw_picture(0), draw_picture(1)]
    prepared = backbone.prepare(pictures)
    pixels = backbone.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        ours = backbone.see(join(prepared))
        states = torch.stack(backbone.vision.tower_states(prepared))
        stock = backbone.model.get_image_features(pixel_values=pixels)
        # By hand: the last layer's states without those of the class token.
        tower = backbone.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        by_hand = backbone.projector(tower)
    features = torch.stack(list(stock.pooler_output if hasattr(stock, "pooler_output") else stock))
    assert ours is not None
    visual_tokens = sum(token == VISUAL for token in prepared[0].ids)
    assert features.shape == (2, visual_tokens, backbone.width)
    torch.testing.assert_close(ours, features.flatten(0, 1), **LAST_BITS)
    torch.testing.assert_close(ours, by_hand.flatten(0, 1), **LAST_BITS)
    torch.testing.assert_close(states, tower, **LAST_BITS)
    assert states.shape == (2, visual_tokens, backbone.vision_width)


def test_backbone_is_frozen_and_its_tower_gives_no_gradient(backbone: HuggingFaceBackbone) -> None:
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    prepared = backbone.prepare([draw_picture(0)])
    seen = backbone.see(join(prepared))
    assert seen is not None and not seen.requires_grad
    assert not backbone.vision.tower_states(prepared)[0].requires_grad
    assert not backbone.training


def test_identity_changes_with_whatever_the_model_reads_and_with_nothing_else(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    for name in ("one", "same"):
        backbone.save(tmp_path / name)
    (tmp_path / "same" / "README.md").write_text("a model card", encoding="utf-8")
    shutil.copytree(tmp_path / "one", tmp_path / "template")
    with (tmp_path / "template" / "chat_template.jinja").open("a", encoding="utf-8") as template:
        template.write(" ")
    with torch.no_grad():
        backbone.projector.linear_1.bias[0] += 1
    backbone.save(tmp_path / "other")
    names = ("one", "same", "other", "template")
    one, same, other, template = (backbone_identity(tmp_path / name) for name in names)
    assert one == same == load_backbone(tmp_path / "one").identity
    assert len({one, other, template}) == 3


def test_saved_weights_are_16_bit_and_in_files_that_a_forge_accepts(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    backbone.save(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    size = sum(file.stat().st_size for file in files)
    # Two bytes a weight and the names; a tied matrix twice would be 22 kB more.
    assert 2 * parameters <= size < 2 * parameters + 12_000
    assert load_backbone(tmp_path, dtype=torch.float16).dtype == torch.float16


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"it has no config\.json"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(BackboneError, match="cannot be loaded as an image-text-to-text model"):
        load_backbone(tmp_path)


def test_model_folder_whose_weights_are_torn_is_refused(tmp_path: Path) -> None:
    tiny_backbone().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(tmp_path)


def test_processor_that_lacks_a_setting_is_named_with_what_to_do(tmp_path: Path) -> None:
    write_model("llava", tmp_path)
    backbone = load_backbone(tmp_path)
    backbone.processor.patch_size = None
    with pytest.raises(BackboneError, match="LlavaProcessor cannot prepare a picture .*patch_size"):
        backbone.prepare([draw_picture(0)])

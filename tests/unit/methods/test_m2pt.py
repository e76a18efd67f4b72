from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmicl_core.backbones.decoding import Decoding, generate
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.backbones.vision import join
from mmicl_core.config.model import M2ptConfig
from mmicl_core.data.pictures import VISUAL, PreparedPicture
from mmicl_core.errors import BackboneError, CheckpointError, ConfigError
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Plain, episode_turns
from mmicl_core.methods.m2pt import DeepPrompts, M2pt
from mmicl_core.prompts import Turn
from tests.fakes import PlainEngine, draw_picture, tiny_backbone
from tests.families import write_model
from tests.methods import answered, batch_rows, unanswered

FAMILIES = (
    "llava",
    "qwen2_5_vl",
    "mistral3",
    "gemma3",
    "idefics2",
    "fast_vlm",
    "blip_2_t5",
    "paligemma",
)
# Of different shapes, where a family makes different numbers of tokens of them.
SHAPES = ((40, 60), (64, 30), (50, 50), (40, 60))
VISUAL_PROMPTS, TEXTUAL_PROMPTS, GENERATED = 3, 2, 4
# 32-bit sums in another order differ in the last bits; scores and losses are of the order of 1.
LAST_BITS = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    @cache
    def write(name: str) -> Path:
        write_model(name, root / name)
        return root / name

    return write


@pytest.fixture(scope="module")
def methods(folder: Callable[[str], Path]) -> Callable[[str], M2pt]:
    return cache(lambda name: make(load_backbone(folder(name))))


@pytest.fixture
def method(methods: Callable[[str], M2pt], request: pytest.FixtureRequest) -> M2pt:
    method = methods(request.getfixturevalue("family")).eval()
    method.zero_grad()
    return method


every_family = pytest.mark.parametrize("family", FAMILIES)


def make(backbone: HuggingFaceBackbone, **settings: Any) -> M2pt:
    """A method whose prompts are far from where they start, so that each of them matters."""
    sizes = {"visual_prompts": VISUAL_PROMPTS, "textual_prompts": TEXTUAL_PROMPTS}
    method = M2pt(backbone, M2ptConfig(**sizes | settings))
    generator = torch.Generator().manual_seed(0)
    for prompts in (method.visual_prompts, method.textual_prompts):
        if prompts is not None:
            with torch.no_grad():
                prompts.vectors.add_(torch.randn(prompts.vectors.shape, generator=generator))
    return method.eval()


def see(backbone: HuggingFaceBackbone) -> dict[str, PreparedPicture]:
    pictures = [draw_picture(number).resize(shape) for number, shape in enumerate(SHAPES)]
    return dict(zip("abcd", backbone.prepare(pictures), strict=True))


def asked(method: M2pt, rows: list[dict[str, Any]]) -> Any:
    return method.collate(unanswered(rows), see(method.backbone), None, side="left")


def loss(method: Any, rows: list[dict[str, Any]], **how: Any) -> Tensor:
    return method(method.collate(rows, see(method.backbone), None, **how))


@every_family
def test_gradient_reaches_every_prompt_set_and_the_projector_and_nothing_else(
    family: str, method: M2pt
) -> None:
    method.train()
    loss(method, batch_rows()).sum().backward()
    moved = {name for name, p in method.named_parameters() if p.grad is not None and bool(p.grad.any())}
    projector = {f"backbone.model.{name}" for name, _ in method.backbone.role_parameters("projector")}
    assert moved == {"visual_prompts.vectors", "textual_prompts.vectors"} | projector
    assert moved == set(method.trainable())
    for prompts in (method.visual_prompts, method.textual_prompts):
        assert prompts is not None
        assert bool(prompts.vectors.grad.abs().amax(-1).all())


@every_family
def test_plain_use_of_the_model_is_unchanged_by_a_method_around_it(family: str, method: M2pt) -> None:
    plain = Plain(method.backbone)
    with torch.no_grad():
        ours = loss(method, batch_rows())
        answering = Decoding(method.backbone, method.embed(asked(method, batch_rows())))
        # Between two steps of a prompted answer.
        theirs = loss(plain, batch_rows())
        answering.feed(answering.scores_BV.argmax(-1))
        again = loss(method, batch_rows())
        untouched = loss(Plain(load_backbone(Path(method.backbone.model.config._name_or_path))), batch_rows())
    assert torch.equal(theirs, untouched)
    assert torch.equal(again, ours)
    assert (theirs - ours).abs().max() > 1e-3


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "blip_2_t5"])
def test_static_keys_and_values_answer_as_the_hooks_do(family: str, method: M2pt) -> None:
    backbone = method.backbone
    with torch.no_grad():
        prefix = method.static_prefix()
        for row in batch_rows():
            batch = asked(method, [row])
            behind_hooks, behind_prefix = method.embed(batch), method.embed_without_opening(batch)
            torch.testing.assert_close(
                Decoding(backbone, behind_prefix, prefix).scores_BV,
                Decoding(backbone, behind_hooks).scores_BV,
                **LAST_BITS,
            )
            said = generate(backbone, behind_hooks, GENERATED)
            assert generate(backbone, behind_prefix, GENERATED, prefix) == said
        assert prefix.get_seq_length() == TEXTUAL_PROMPTS
        batch = asked(method, batch_rows())
        padded = method.embed_without_opening(batch)
        if family == "gemma3":
            # Its windows are counted in columns, padding included.
            with pytest.raises(BackboneError, match=r"of \[\d+, \d+\] tokens stand behind one cache"):
                Decoding(backbone, padded, prefix)
            return
        said = generate(backbone, method.embed(batch), GENERATED)
        assert generate(backbone, padded, GENERATED, prefix) == said


@pytest.mark.parametrize("family", ["blip_2_t5"])
def test_static_keys_and_values_of_an_encoder_are_refused(family: str, method: M2pt) -> None:
    with pytest.raises(ConfigError, match="of this blip-2 go into an encoder"):
        method.static_prefix()


def test_tower_and_projector_see_as_if_every_block_were_run_by_hand_with_its_own_prompts(
    folder: Callable[[str], Path],
) -> None:
    for preset in ("clean", "released"):
        backbone = load_backbone(folder("llava"))
        method = make(backbone, preset=preset)
        pictures = see(backbone)
        batch = method.collate(batch_rows(), pictures, None)
        with torch.no_grad():
            visual, soft = method.look(batch)
            keys = [key for row in batch_rows() for turn in episode_turns(row) for key in turn.pictures]
            seen = [released_by_hand(method, pictures[key]) for key in keys]
        tokens = torch.cat([soft.unflatten(0, (len(keys), -1)), visual.unflatten(0, (len(keys), -1))], dim=1)
        if preset == "released":
            torch.testing.assert_close(tokens, torch.stack(seen), **LAST_BITS)
        else:
            last = backbone.projector(method.visual_prompts.vectors[-1]).detach()
            for one, other in zip(tokens, seen, strict=True):
                torch.testing.assert_close(one[:VISUAL_PROMPTS], last, **LAST_BITS)
                # Behind the released code's prompts and class token come the same patches.
                torch.testing.assert_close(one[VISUAL_PROMPTS:], other[VISUAL_PROMPTS:], **LAST_BITS)


def released_by_hand(method: M2pt, picture: PreparedPicture) -> Tensor:
    """What the released code gives the language model of one picture: it keeps all states of the tower with
    their prompts, and takes the last but one without its first row."""
    tower, states = method.backbone.vision_tower, []
    hidden = tower.pre_layrnorm(tower.embeddings(picture.inputs["pixel_values"]))
    hidden = torch.cat([torch.zeros(1, VISUAL_PROMPTS, hidden.shape[-1]), hidden], dim=1)
    for block, prompts_SW in zip(tower.encoder.layers, method.visual_prompts.vectors, strict=True):
        hidden = torch.cat([prompts_SW[None], hidden[:, VISUAL_PROMPTS:]], dim=1)
        states.append(hidden)
        hidden = block(hidden, None)
    states.append(hidden)
    return method.backbone.projector(states[-2][0, 1:])


@cache
def meta_llava() -> HuggingFaceBackbone:
    """LLaVA v1 without weights: Vicuna 7B, CLIP ViT-L/14 of 224 pixels."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    # Its defaults are those of LLaMA 7B.
    text = LlamaConfig(tie_word_embeddings=False)
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return HuggingFaceBackbone(model, tiny_backbone().processor, identity="meta")


def meta_method(**settings: Any) -> M2pt:
    backbone = meta_llava()
    backbone.requires_grad_(requires_grad=False)
    with torch.device("meta"):
        return M2pt(backbone, M2ptConfig(**settings))


@pytest.mark.parametrize(
    ("visual", "textual", "paper"),
    [(10, 10, 5_754_880), (20, 10, 6_000_640), (10, 20, 7_065_600), (20, 20, 7_311_360)],
)
def test_trained_parameters_of_llava_v1_are_as_many_as_the_paper_counts(
    visual: int, textual: int, paper: int
) -> None:
    method = meta_method(visual_prompts=visual, textual_prompts=textual)
    trained = {name: parameter.numel() for name, parameter in method.trainable().items()}
    prompts = sum(count for name, count in trained.items() if name.endswith("prompts.vectors"))
    assert prompts == 24 * visual * 1024 + 32 * textual * 4096
    # The paper's projector is one matrix with a bias; this library's LLaVA has two.
    one, two = 1024 * 4096 + 4096, 4096 * 4096 + 4096
    assert one == 4_198_400
    assert prompts + one == paper
    assert sum(trained.values()) == prompts + one + two


@pytest.mark.parametrize("preset", ["clean", "released"])
def test_picture_of_llava_v1_takes_266_positions_with_10_prompts(preset: str) -> None:
    method = meta_method(preset=preset)
    plain = Plain(method.backbone)
    picture = PreparedPicture((VISUAL,) * 256, inputs={"pixel_values": torch.zeros(1, 3, 2, 2)})
    batch = method.collate([answered(["a"], ["bako"])], {"a": picture}, None)
    assert int((batch.packed.image_BL | batch.packed.fused_BL).sum()) == 266
    unprompted = plain.collate([answered(["a"], ["bako"])], {"a": picture}, None)
    assert batch.packed.ids_BL.shape[1] == unprompted.packed.ids_BL.shape[1] + 10
    shown = (Turn(("a",), "This is", "bako"), {"a": picture})
    assert method.demonstration_tokens(*shown) == plain.demonstration_tokens(*shown) + 10
    assert any("lm_head" in name for name in method.trainable()) == (preset == "released")


def test_prompts_start_as_wide_as_xavier_makes_one_set_of_them() -> None:
    prompts = DeepPrompts(5, 10, 1024)
    widest = (6 / (10 * 1024 + 1024)) ** 0.5
    largest = prompts().detach().abs().amax((1, 2))
    # The largest of 10 240 uniform numbers.
    assert bool(((largest <= widest) & (largest > 0.99 * widest)).all())
    assert len(set(largest.tolist())) == 5


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("llava", "clean"),
        ("llava", "released"),
        ("qwen3_vl", "clean"),
        ("gemma3", "clean"),
        ("idefics2", "clean"),
        ("instructblip_vicuna", "clean"),
    ],
)
def test_batch_without_pictures_gives_visual_prompts_and_projector_a_gradient_of_zero(
    family: str, preset: str, folder: Callable[[str], Path]
) -> None:
    method = make(load_backbone(folder(family)), preset=preset, train_head=False)
    loss(method, [answered([], ["bako"])]).sum().backward()
    for name, parameter in method.trainable().items():
        # No gradient at all would leave other workers waiting for one.
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (name == "textual_prompts.vectors"), name


def test_one_kind_of_prompts_alone_is_trained_alone(folder: Callable[[str], Path]) -> None:
    backbone = load_backbone(folder("llava"))
    only_textual = make(backbone, visual_prompts=0, train_projector=False)
    assert set(only_textual.trainable()) == {"textual_prompts.vectors"}
    only_visual = make(backbone, textual_prompts=0, train_projector=False)
    assert set(only_visual.trainable()) == {"visual_prompts.vectors"}
    assert only_visual.static_prefix() is None
    with torch.no_grad():
        plain = loss(Plain(backbone), batch_rows())
        for method in (only_textual, only_visual):
            assert (loss(method, batch_rows()) - plain).abs().max() > 1e-3


def test_head_is_trained_where_asked_and_refused_where_it_is_the_token_embeddings(
    folder: Callable[[str], Path],
) -> None:
    method = make(load_backbone(folder("llava")), train_head=True)
    assert "backbone.model.lm_head.weight" in method.trainable()
    loss(method, batch_rows()).sum().backward()
    assert bool(method.backbone.head.weight.grad.any())
    with pytest.raises(ConfigError, match="train_head is true, but the head of this model is its token emb"):
        make(tiny_backbone(), train_head=True)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "fast_vlm", "paligemma"])
def test_released_preset_is_refused_where_no_class_token_is_dropped(
    family: str, folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError, match=r"passes on the class token of a LLaVA .* to 'clean'"):
        make(load_backbone(folder(family)), preset="released", train_head=False)


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "idefics3", "gemma3", "mistral3"])
def test_prompt_is_projected_as_a_picture_that_is_this_prompt_all_over(
    family: str, folder: Callable[[str], Path]
) -> None:
    backbone = load_backbone(folder(family))
    prompt_W = torch.randn(24, generator=torch.Generator().manual_seed(0))

    def fill(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = given
        return prompt_W.repeat(states.shape[-1] // 24).expand_as(states).contiguous(), *others

    with torch.no_grad():
        backbone.projector.register_forward_pre_hook(fill)
        tokens = backbone.see(join([see(backbone)["a"]]))
        backbone.projector._forward_pre_hooks.clear()
        (token_D,) = backbone.vision.project_states(prompt_W[None])
    assert len(tokens) > 1
    torch.testing.assert_close(tokens, token_D.expand_as(tokens), **LAST_BITS)


def test_projector_of_several_tower_layers_takes_each_prompt_in_the_place_of_all() -> None:
    config = tiny_backbone().model.config
    config.vision_feature_layer = [1, -1]
    torch.manual_seed(0)
    backbone = HuggingFaceBackbone(
        LlavaForConditionalGeneration(config), tiny_backbone().processor, identity="two"
    )
    method = make(backbone)
    assert len(method.blocks) == 2
    loss(method, batch_rows()).sum().backward()
    assert bool(method.visual_prompts.vectors.grad.abs().amax(-1).all())
    last = method.visual_prompts.vectors[-1]
    expected = backbone.projector(torch.cat([last, last], dim=-1))
    torch.testing.assert_close(backbone.vision.project_states(last), expected, **LAST_BITS)


def test_prompts_stay_in_32_bits_inside_a_model_of_16() -> None:
    method = make(tiny_backbone())
    with torch.no_grad():
        whole = loss(method, batch_rows())
    method.backbone.to(torch.bfloat16)
    halved = loss(method, batch_rows())
    halved.sum().backward()
    for prompts in (method.visual_prompts, method.textual_prompts):
        assert prompts.vectors.dtype == prompts.vectors.grad.dtype == torch.float32
        assert bool(prompts.vectors.grad.isfinite().all())
    # bfloat16 keeps 8 bits, and losses of an untrained model are of the order of 10.
    torch.testing.assert_close(halved.detach(), whole, atol=0.5, rtol=0.05)


def test_gradient_checkpointing_of_tower_and_language_model_changes_no_gradient() -> None:
    gradients: list[Mapping[str, Tensor]] = []
    for checkpoints in (False, True):
        method = make(tiny_backbone())
        if checkpoints:
            method.backbone.model.activation_checkpointing_enable({"use_reentrant": False})
            for block in (*method.backbone.layers, *method.backbone.vision_layers):
                block.training = True
        loss(method, batch_rows()).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in method.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **LAST_BITS)


def test_method_learns_two_episodes_by_heart() -> None:
    method = M2pt(tiny_backbone(), M2ptConfig())
    engine = PlainEngine(method, learning_rate=1e-2)
    batch = method.collate(batch_rows(), see(method.backbone), None)
    first = float(method(batch).detach().mean())
    for _ in range(40):
        engine.backward(method(batch).mean())
        engine.step(1.0)
    # A few answer tokens, and hundreds of numbers that steer a frozen, untrained model.
    assert float(method(batch).detach().mean()) < first / 2


def test_saved_method_says_the_same_and_training_goes_on_from_it(tmp_path: Path) -> None:
    method = make(tiny_backbone())
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.add_(0.1)
        said = loss(method, batch_rows())
    method.save(tmp_path, {})
    sizes = {"visual_prompts": VISUAL_PROMPTS, "textual_prompts": TEXTUAL_PROMPTS}
    for start in (None, str(tmp_path)):
        other = M2pt(tiny_backbone(), M2ptConfig(**sizes, start=start))
        if start is None:
            load_parameters(other, tmp_path)
        assert set(other.trainable()) == set(method.trainable())
        with torch.no_grad():
            assert torch.equal(loss(other, batch_rows()), said)
    wider = M2pt(tiny_backbone(), M2ptConfig(**sizes | {"textual_prompts": 5}))
    with pytest.raises(CheckpointError, match=r"textual_prompts.vectors is \(2, 2, 32\) there, \(2, 5, 32\)"):
        load_parameters(wider, tmp_path)

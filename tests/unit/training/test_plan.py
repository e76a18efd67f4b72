from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.config.model import AimConfig, LclConfig, M2ptConfig
from mmicl_core.config.run import load_run
from mmicl_core.config.train import TrainConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods import build_method
from mmicl_core.methods.base import Method
from mmicl_core.training.hardware import Hardware
from mmicl_core.training.memory import PromptShape, States, activations, count_roles, read_block, spread
from mmicl_core.training.plan import Plan, make_plan
from pipelines.arguments import RECIPES
from tests.fakes import random_pictures, tiny_backbone
from tests.families import NAMES, write_model
from tests.methods import METHOD_NAMES, answered, make_method
from tests.real_models import outline

LLAVA, LLAVA_NEXT = "llava-1.5-7b-hf", "llava-v1.6-vicuna-7b-hf"
BATCH, LENGTH = 3, 64
PROMPT = PromptShape(2000, 20)
CPU = Hardware("a CPU", 2, "cpu", 16 * 10**9, 16 * 10**9)
STAGES = (0, 1, 2, 3)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"micro_batch": BATCH, "global_batch": 2 * BATCH, **changes})


def family(name: str, folder: Path, **how: Any) -> HuggingFaceBackbone:
    write_model(name, folder, size=64)
    return load_backbone(folder, **how)


@contextmanager
def kept_for_the_way_back(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of what autograd saves meanwhile, but for the module's own."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def prompts(backbone: HuggingFaceBackbone, *, padded: bool) -> Embedded:
    """Random prompts that take a gradient, of unequal lengths where they are padded."""
    shape = (BATCH, LENGTH)
    embeds = torch.randn(*shape, backbone.width, dtype=backbone.dtype, requires_grad=True)
    mask = torch.ones(shape, dtype=torch.long)
    if padded:
        mask[0, -9:] = 0
    nothing = torch.zeros(shape, dtype=torch.bool)
    return Embedded(embeds, mask, nothing, nothing, (mask.cumsum(1) - 1).clamp(min=0))


def read_and_count(backbone: HuggingFaceBackbone) -> int:
    given = prompts(backbone, padded=True)
    with kept_for_the_way_back(backbone) as kept:
        backbone.read(given)
    return sum(kept.values())


def language_bytes(method: Method, train: TrainConfig) -> int:
    return activations(method, train, CPU, PromptShape(LENGTH, 1, patches=16)).language


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3", "blip_2_opt"])
def test_language_model_keeps_as_many_bytes_as_planned(
    name: str, precision: str, attention: str, tmp_path: Path
) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    backbone = family(name, tmp_path, dtype=dtype, attention=attention)
    method = make_method("aim", backbone)
    planned = language_bytes(method, settings(precision=precision, attention=attention))
    # Rows of sines, which few families keep in other ways, weigh at this width more than at any real one.
    assert planned == pytest.approx(read_and_count(backbone), rel=0.06)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_language_model_keeps_what_its_matrices_are_given(
    name: str, precision: str, tmp_path: Path
) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    backbone = family(name, tmp_path, dtype=dtype)
    method = build_method(backbone, LclConfig())
    planned = language_bytes(method, settings(precision=precision))
    assert planned == pytest.approx(read_and_count(backbone), rel=0.04)


def test_low_rank_updates_keep_their_input_and_what_lies_between(tmp_path: Path) -> None:
    frozen = family("llava", tmp_path)
    without = read_and_count(frozen)
    method = make_method("lora", frozen)
    counted = read_and_count(frozen)
    assert language_bytes(method, settings()) == pytest.approx(counted, rel=0.03)
    assert counted > 1.1 * without


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_checkpointed_layers_keep_only_what_enters_them(name: str, tmp_path: Path) -> None:
    backbone = family(name, tmp_path)
    method = make_method("aim", backbone)
    backbone.language_model.activation_checkpointing_enable()
    backbone.language_model.train()
    given = prompts(backbone, padded=True)
    before = {id(t) for t in gc.get_objects() if type(t) is Tensor}
    with kept_for_the_way_back(backbone) as kept:
        output = backbone.read(given)
    # What a checkpointed layer was given, python holds.
    held = [t for t in gc.get_objects() if type(t) is Tensor and id(t) not in before]
    kept |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    planned = language_bytes(method, settings(gradient_checkpointing=True))
    # Beside it one mask, which all layers share, and the output.
    shared = BATCH * LENGTH * LENGTH + output.last_hidden_state.nbytes
    assert sum(kept.values()) - shared == pytest.approx(planned, rel=0.1)
    assert planned < language_bytes(method, settings()) / 4


def test_vision_tower_that_takes_gradients_keeps_as_many_bytes_as_planned(tmp_path: Path) -> None:
    backbone = family("llava", tmp_path)
    method = make_method("m2pt", backbone)
    pixels = torch.randn(BATCH, 3, 28, 28, requires_grad=True)
    with kept_for_the_way_back(backbone) as kept:
        backbone.vision_tower(pixels)
    # 16 patches and the class token. The gradient comes in with the pictures here, which are kept for it.
    planned = activations(method, settings(), CPU, PromptShape(LENGTH, 1, patches=17))
    assert planned.vision == pytest.approx(sum(kept.values()) - pixels.nbytes, rel=0.07)
    frozen = activations(make_method("lcl", family("llava", tmp_path)), settings(), CPU, PromptShape(64, 1))
    assert frozen.vision == 0


def test_whole_step_of_aim_keeps_as_many_bytes_as_planned() -> None:
    backbone = tiny_backbone(width=64)
    method = make_method("aim", backbone)
    row = answered([*"abcd" * 3], ["red", "blue"] * 6)
    batch = method.collate([row] * BATCH, random_pictures("abcd", backbone), None)
    batch = type(batch)(batch.packed, batch.pictures, method.reader.read(batch.shown))
    tokens, scored = batch.packed.ids_BL.shape[1], batch.num_scored // BATCH
    with kept_for_the_way_back(method) as kept:
        method(batch)
    planned = activations(method, settings(), CPU, PromptShape(tokens, scored))
    vocabulary = backbone.text_config.vocab_size
    scores = 4 * batch.num_scored * vocabulary
    assert sum(kept.values()) == pytest.approx(planned.language + planned.beside + scores, rel=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_every_family_are_read(name: str, tmp_path: Path) -> None:
    backbone = family(name, tmp_path)
    heads = int(backbone.text_config.num_attention_heads)
    block = read_block(backbone.layers[0])
    assert block.queries % heads == 0 and block.queries >= block.keys > 0
    assert block.inner >= backbone.width and not block.trained
    assert block.root_norms or block.layer_norms
    if backbone.vision_layers is not None:
        seen = read_block(backbone.vision_layers[0])
        assert seen.queries == seen.keys > 0
        assert seen.inner > 0


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_roles_hold_every_parameter_once(name: str) -> None:
    method = make_method(name, tiny_backbone())
    roles = count_roles(method)
    assert sum(role.parameters for role in roles) == sum(p.numel() for p in method.parameters())
    assert sum(role.trained for role in roles) == sum(
        p.numel() for p in method.parameters() if p.requires_grad
    )


def test_aim_trains_its_own_module_alone() -> None:
    roles = {role.name: role for role in count_roles(make_method("aim", tiny_backbone()))}
    assert roles["module"].trained == roles["module"].parameters == 32 * 32 + 3 * 32
    assert not any(role.trained for name, role in roles.items() if name != "module")


def ways(method: Method, hardware: Hardware, train: TrainConfig) -> list[States]:
    return [spread(method, train, hardware, stage, optimizer=False, parameters=False) for stage in STAGES]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [AimConfig(), LclConfig(), M2ptConfig()])
def test_higher_stage_never_holds_more(config: Any, precision: str) -> None:
    method = build_method(outline(LLAVA), config)
    train = settings(precision=precision, num_workers=8, global_batch=32)
    _, *held = (row.held for row in ways(method, Hardware.described(8, "80GB"), train))
    assert held == sorted(held, reverse=True)


def test_offloading_moves_bytes_off_the_device() -> None:
    method, hardware = build_method(outline(LLAVA), LclConfig()), Hardware.described(8, "80GB")
    for stage in (1, 2, 3):
        here = spread(method, settings(), hardware, stage, optimizer=False, parameters=False)
        there = spread(method, settings(), hardware, stage, optimizer=True, parameters=False)
        assert there.held < here.held and there.host > 0 == here.host
    everything = spread(method, settings(), hardware, 3, optimizer=True, parameters=True)
    assert everything.held == 0
    assert everything.host == there.host + here.weights


def test_training_everything_agrees_with_the_estimates_of_deepspeed() -> None:
    backbone = outline(LLAVA)
    method, workers = build_method(backbone, LclConfig()), 8
    backbone.unfreeze("vision_tower")
    everything = sum(p.numel() for p in method.parameters())
    _, _, second, third = ways(method, Hardware.described(workers, "80GB"), settings())
    # `estimate_zero2_model_states_mem_needs` counts 16-bit gradients too, which travel in buckets here.
    trained = sum(p.numel() for p in method.trainable().values())
    assert second.held == pytest.approx(2 * everything + 16 * trained / workers)
    # `estimate_zero3_model_states_mem_needs`, without its largest layer.
    assert third.held == pytest.approx(2 * everything / workers + 16 * trained / workers)
    assert trained == pytest.approx(everything, rel=0.01)


def planned(memory: str, config: Any = None, **changes: Any) -> Plan:
    method = build_method(outline(LLAVA_NEXT), config or AimConfig())
    train = TrainConfig(**{"num_workers": 8, "micro_batch": 2, "attention": "flash_attention_2", **changes})
    return make_plan(method, train, Hardware.described(8, memory), PROMPT)


def test_aim_on_large_devices_is_told_to_leave_the_weights_whole() -> None:
    plan = planned("80GB")
    assert plan.recommended is not None and plan.recommended.stage == 1
    assert "instead of stage 3" in plan.advice and "1.3 to 1.4 times faster" in plan.advice


def test_aim_on_small_devices_is_told_to_spread_or_to_compute_again() -> None:
    assert planned("40GB").recommended == planned("40GB", zero={"stage": 3}).recommended
    assert planned("30GB").recommended is not None and planned("30GB").recommended.stage == 3  # type: ignore[union-attr]
    plan = planned("20GB")
    assert plan.recommended is None
    assert "train.gradient_checkpointing true" in plan.advice
    assert any("set train.gradient_checkpointing to true" in hazard for hazard in plan.hazards)


def test_model_larger_than_any_device_fits_nowhere() -> None:
    plan = planned("1GB")
    assert plan.recommended is None and plan.advice.startswith("nothing fits in 1.0 GB")


def test_model_larger_than_a_device_is_only_loaded_where_it_is_spread() -> None:
    whole = planned("12GB", zero={"stage": 2})
    assert any("only stage 3 spreads the model" in hazard for hazard in whole.hazards)
    assert not any("only stage 3" in hazard for hazard in planned("12GB").hazards)


def test_method_without_gradients_has_no_plan() -> None:
    with pytest.raises(ConfigError, match="fitted without gradients"):
        make_plan(make_method("mtv", tiny_backbone()), settings(), CPU, PromptShape(10, 1))


def test_muon_is_planned_for_stage_3_on_the_device_alone() -> None:
    assert {row.name for row in planned("80GB", muon_learning_rate=0.02).states} == {
        "stage 3",
        "stage 3, parameters on the host",
    }


@pytest.mark.parametrize(
    ("changes", "hardware", "words"),
    [
        ({"global_batch": 7}, CPU, "no multiple of 2 workers x 3"),
        ({"autocast": True}, Hardware("", 2, "cpu", 10**9, 10**9, amx=False), "does not multiply bf16"),
        ({"precision": "bf16"}, Hardware("", 2, "cpu", 10**9, 10**9, amx=False), "does not multiply bf16"),
        ({"precision": "bf16", "autocast": True}, CPU, "has no effect"),
        ({"attention": "flash_attention_2"}, CPU, "runs on GPUs alone"),
        ({"num_workers": 3}, CPU, "train.num_workers asks for 3"),
        (
            {"zero": {"offload_optimizer": "nvme", "nvme_path": "/local"}},
            Hardware("", 2, "gpu", 10**9, 10**9, has_compiler=False),
            "no C++ compiler",
        ),
        ({"zero": {"offload_optimizer": "cpu"}}, Hardware("", 2, "gpu", 10**9, 1000), "are offloaded"),
        ({}, Hardware("", 2, "cpu", 10**8, None), "export MALLOC_MMAP_THRESHOLD_"),
        ({}, CPU, "longer than the 2048 positions"),
    ],
)
def test_hazard_is_told_where_it_is(changes: dict[str, Any], hardware: Hardware, words: str) -> None:
    method = make_method("aim", tiny_backbone())
    plan = make_plan(method, settings(**changes), hardware, PromptShape(4000, 1))
    assert any(words in hazard for hazard in plan.hazards), plan.hazards
    harmless = make_plan(method, settings(), CPU, PromptShape(100, 1))
    assert not any(words in hazard for hazard in harmless.hazards)


def test_weights_that_leave_no_room_for_what_is_trained_are_told_to_be_spread() -> None:
    plan = planned("24GB", LclConfig(), zero={"stage": 1})
    assert any("set train.zero.stage to 3" in hazard for hazard in plan.hazards)


def test_stage_3_with_pixels_tells_of_blank_pictures() -> None:
    plan = planned("80GB", LclConfig())
    assert any("looks at a blank one" in hazard for hazard in plan.hazards)


def test_tower_for_pictures_of_any_size_asks_how_large_they_are() -> None:
    method = build_method(outline("Qwen2.5-VL-7B-Instruct"), M2ptConfig())
    with pytest.raises(ConfigError, match="say how many patches"):
        make_plan(method, settings(), Hardware.described(2, "80GB"), PromptShape(100, 1))


def test_hardware_is_read_from_words_and_from_the_machine() -> None:
    assert Hardware.described(8, "80GB").device_bytes == 80 * 10**9
    assert Hardware.described(1, "1.5 GiB", "1 TB") == Hardware("1 x 1.5 GiB", 1, "gpu", 3 * 2**29, 10**12)
    here = Hardware.here(2)
    assert here.workers == 2 and here.device_bytes > 10**8
    with pytest.raises(ConfigError, match="'80' is no memory size: write a number and one of GB"):
        Hardware.described(8, "80")
    with pytest.raises(ConfigError, match="0 GPUs has no worker"):
        Hardware.described(0, "80GB")


def test_plan_is_printed_with_a_star_at_the_settings_and_kept_as_json() -> None:
    plan = planned("80GB", zero={"stage": 2})
    (starred,) = (line for line in plan.lines() if line.startswith("*"))
    assert starred.startswith("* stage 2 ")
    assert any("16,789,504 trained" in line for line in plan.lines())
    plain = json.loads(json.dumps(plan.as_json()))
    assert [row["peak"] for row in plain["states"]] == [
        row.peak(plan.activations.total) for row in plan.states
    ]
    assert plain["activations"]["language"] == plan.activations.language


def test_operations_and_hours_follow_from_tokens_and_steps() -> None:
    plan = planned("80GB", steps=1000, global_batch=32)
    tokens = 32 * PROMPT.tokens
    # A frozen language model: one product forward and one back for each of its numbers, the words left out.
    body = next(role.parameters for role in plan.roles if role.name == "language_model") - 32064 * 4096
    assert plan.operations == pytest.approx(4 * body * tokens, rel=0.01)
    assert plan.hours == pytest.approx(plan.operations * 1000 / 1e14 / 3600)
    again = planned("80GB", steps=1000, global_batch=32, gradient_checkpointing=True)
    assert again.operations / plan.operations == pytest.approx(1.5, rel=0.01)
    assert any(f"1,000 steps: {plan.hours:,.3g} GPU hours at 100 TFLOP/s" in line for line in plan.lines())


def test_method_that_learns_from_pictures_alone_keeps_the_tower_and_no_language_model() -> None:
    method = build_method(tiny_backbone(), load_run(RECIPES / "nano_1_vision.yaml").method)
    whole = activations(method, settings(), CPU, PromptShape(1, 1))
    assert whole.language == 0 < whole.vision
    again = activations(method, settings(gradient_checkpointing=True), CPU, PromptShape(1, 1))
    assert again.vision < whole.vision / 4 and again.passing > whole.passing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_encoder_of_an_encoder_decoder_keeps_as_many_bytes_as_planned(attention: str, tmp_path: Path) -> None:
    backbone = family("blip_2_t5", tmp_path, attention=attention)
    method, train = make_method("aim", backbone), settings(attention=attention)
    encoder = activations(method, train, CPU, PromptShape(LENGTH, 0)).language
    # What the decoder keeps of the encoder's states, whatever is scored.
    encoder -= len(backbone.layers) * BATCH * LENGTH * 2 * 4 * read_block(backbone.layers[0]).keys
    assert encoder == pytest.approx(read_and_count(backbone), rel=0.02)
    assert language_bytes(method, train) > encoder

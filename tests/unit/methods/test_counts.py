"""How many parameters the methods train around the models that people use, counted without their weights.

The formulas are those of the papers; the sizes are those of the published models (`tests.real_models`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.model import AimConfig, LclConfig, M2ptConfig, MmictConfig, SupConConfig
from mmicl_core.config.run import load_run
from mmicl_core.methods import build_method
from mmicl_core.methods.base import Method
from pipelines.arguments import RECIPES
from tests.fakes import tiny_backbone
from tests.real_models import REAL, outline

LLAVA, LLAVA_NEXT, QWEN = "llava-1.5-7b-hf", "llava-v1.6-vicuna-7b-hf", "Qwen2.5-VL-7B-Instruct"
FLAN = "instructblip-flan-t5-xl"
# Of LLaVA-1.5: two matrices with their biases.
LLAVA_PROJECTOR = 1024 * 4096 + 4096 + 4096 * 4096 + 4096


def counted(method: Method) -> int:
    return sum(parameter.numel() for parameter in method.trainable().values())


@pytest.mark.parametrize(("name", "width"), [(LLAVA, 4096), (LLAVA_NEXT, 4096), (QWEN, 3584)])
def test_aim_trains_one_square_matrix_a_bias_and_a_norm(name: str, width: int) -> None:
    assert counted(build_method(outline(name), AimConfig())) == width * width + 3 * width
    # 17 M as the paper says it of width 4096.
    plain = counted(build_method(outline(name), AimConfig(layer_norm=False)))
    assert plain == width * width + width
    assert name == QWEN or 16_777_216 <= plain < 17_000_000


@pytest.mark.parametrize(
    ("visual", "textual", "prompts"),
    [(10, 10, 1_556_480), (20, 10, 1_802_240), (10, 20, 2_867_200), (20, 20, 3_112_960)],
)
def test_m2pt_trains_prompts_of_every_layer_and_the_projector(
    visual: int, textual: int, prompts: int
) -> None:
    settings: dict[str, Any] = {"visual_prompts": visual, "textual_prompts": textual}
    assert prompts == 24 * visual * 1024 + 32 * textual * 4096
    method = build_method(outline(LLAVA), M2ptConfig(**settings))
    assert counted(method) == prompts + LLAVA_PROJECTOR
    without = build_method(outline(LLAVA), M2ptConfig(**settings, train_projector=False))
    assert counted(without) == prompts
    # With the one matrix of LLaVA v1 in the projector's place: 5,754,880 at ten and ten.
    assert prompts + 1024 * 4096 + 4096 == {1_556_480: 5_754_880, 1_802_240: 6_000_640}.get(
        prompts, {2_867_200: 7_065_600, 3_112_960: 7_311_360}.get(prompts)
    )


def test_m2pt_as_released_trains_the_head_too() -> None:
    method = build_method(outline(LLAVA), M2ptConfig(preset="released"))
    assert counted(method) == 1_556_480 + LLAVA_PROJECTOR + 32064 * 4096


def test_mmict_trains_a_whole_q_former_of_some_187_million() -> None:
    method = build_method(outline(FLAN), MmictConfig())
    width, inner, states, vocabulary = 768, 3072, 1408, 30523
    attention = 4 * (width * width + width) + 2 * width
    crossing = 2 * (width * width + width) + 2 * (states * width + width) + 2 * width
    feeding = width * inner + inner + inner * width + width + 2 * width
    texts = (vocabulary + 512) * width + 2 * width
    hub = 12 * (attention + 2 * feeding) + 6 * crossing + texts + 32 * width
    assert counted(method) == hub + 2 * states + width * 2048 + 2048 + 2048
    assert 186e6 < counted(method) < 188e6


def test_lcl_trains_all_of_the_language_model_and_the_projector_and_leaves_the_tower() -> None:
    backbone = outline(LLAVA)
    everything = sum(parameter.numel() for parameter in backbone.parameters())
    tower = sum(parameter.numel() for _, parameter in backbone.role_parameters("vision_tower"))
    assert counted(build_method(backbone, LclConfig())) == everything - tower


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_trains_as_many_parameters_as_its_header_says(recipe: Path) -> None:
    run = load_run(recipe)
    name = {"lcl-2way": LLAVA}.get(Path(run.backbone.path).name, Path(run.backbone.path).name)
    backbone = outline(name) if name in REAL else tiny_backbone()
    # What it starts from is not here; sizes do not depend on it.
    changes = {} if isinstance(run.method, SupConConfig) else {"start": None}
    trained = counted(build_method(backbone, run.method.model_copy(update=changes)))
    assert trained > 0
    if backbone.device.type == "meta":
        said = f"{trained / 1e9:.2f} B" if trained >= 1e9 else f"{trained / 1e6:.1f} M"
        header = recipe.read_text(encoding="utf-8").partition("\n\n")[0]
        assert said in header, f"it trains {said}"

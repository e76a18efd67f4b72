"""Stand-ins at the boundary: a small corpus, an untrained backbone, a plain-torch engine.

Nothing here imitates a model or a reader: the corpus is real tar files of real pictures, the backbone
is a real LLaVA that is only small, and the engine takes real gradients.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.nano import build_nano
from mmicl_core.config.corpus import CorpusConfig
from mmicl_core.config.model import BackboneConfig
from mmicl_core.data.catalogue import CATALOGUED, Catalogue, make_bucket, write_bucket
from mmicl_core.data.exchange import bucket_of
from mmicl_core.data.names import SYLLABLES
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.methods.base import Method

__all__ = [
    "HELD_OUT_STYLE",
    "TINY_STYLES",
    "PlainEngine",
    "draw_picture",
    "encode_picture",
    "episode_row",
    "metadata",
    "pair_rows",
    "random_pictures",
    "reading",
    "tiny_backbone",
    "write_catalogue",
    "write_corpus",
    "write_materials",
    "write_tar",
]

TINY_STYLES = ("ink", "chalk", "oil", "pixel")
HELD_OUT_STYLE = "pixel"
TINY_TAXONOMY = {
    "red-cat": ("animals", "cats"),
    "blue-cat": ("animals", "cats"),
    "green-cat": ("animals", "cats"),
    "grey-cat": ("animals", "cats"),
    "red-cup": ("objects", "cups"),
    "blue-cup": ("objects", "cups"),
    "green-cup": ("objects", "cups"),
    "grey-cup": ("objects", "cups"),
}
TINY_HELD_OUT = ("grey-cat", "green-cat", "grey-cup", "green-cup")


def draw_picture(seed: int, side: int = 72) -> Image.Image:
    """A picture of coloured blocks, another one for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def encode_picture(picture: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def metadata(concept: str, style: str) -> dict[str, Any]:
    """What a sample's JSON says; the taxonomy is `TINY_TAXONOMY` where it knows the concept."""
    category, subcategory = TINY_TAXONOMY.get(concept, ("animals", "cats"))
    return {
        "concept": concept,
        "name": concept.replace("-", " "),
        "keywords": concept.split("-"),
        "category": category,
        "subcategory": subcategory,
        "style": style,
        "licence": "CC0-1.0",
        "source": "tests",
    }


def write_materials(folder: Path) -> Path:
    """A tiny corpus and a tiny backbone in `folder`, which is given back; `reading` reads them."""
    write_corpus(folder / "corpus")
    tiny_backbone().save(folder / "backbone")
    return folder


def reading(folder: Path) -> dict[str, Any]:
    """The sections of a run that reads what `write_materials` wrote."""
    return {
        "corpus": CorpusConfig(path=str(folder / "corpus")),
        "backbone": BackboneConfig(path=str(folder / "backbone")),
    }


def pair_rows(
    concepts: Iterable[str] = tuple(TINY_TAXONOMY), styles: Iterable[str] = TINY_STYLES
) -> list[dict[str, Any]]:
    """PAIR rows without pictures, one for each concept and style."""
    return [
        {"picture": f"{concept}__{style}"} | metadata(concept, style)
        for concept in concepts
        for style in styles
    ]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of `members` in their order, compressed where the name ends in `.gz`."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_corpus(folder: Path, shards: int = 2) -> Path:
    """Eight concepts in four styles, half of the concepts and one style held out, in tar shards."""
    folder.mkdir(parents=True, exist_ok=True)
    members: list[list[tuple[str, bytes]]] = [[] for _ in range(shards)]
    for number, row in enumerate(pair_rows()):
        about = {key: value for key, value in row.items() if key != "picture"}
        members[number % shards] += [
            (f"{row['picture']}.json", json.dumps(about).encode()),
            (f"{row['picture']}.png", encode_picture(draw_picture(number))),
        ]
    for number, shard in enumerate(members):
        write_tar(folder / f"tiny-{number}.tar", shard)
    split = {"held_out_concepts": list(TINY_HELD_OUT), "held_out_style": HELD_OUT_STYLE}
    (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")
    return folder


def write_catalogue(
    folder: Path, rows: Iterable[Mapping[str, Any]], min_pictures: int = 1, buckets: int = 1
) -> Catalogue:
    """A catalogue of CATALOGUED rows that say `group` and `picture` at least; no two pictures look alike."""
    rows = [_catalogued(row) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(buckets):
        here = [row for row in rows if bucket_of(row["group"], buckets) == number]
        pictures, groups, _ = make_bucket(pa.Table.from_pylist(here, schema=CATALOGUED), min_pictures)
        write_bucket(folder, number, pictures, groups)
    return Catalogue(folder)


def _catalogued(row: Mapping[str, Any]) -> dict[str, Any]:
    key = row["picture"].encode()
    known = {
        "image": {"path": "corpus:tiny.tar", "member": row["picture"], "offset": 0, "size": 1},
        "concept": row["group"],
        "name": row["group"].replace("-", " "),
        "sha256": hashlib.sha256(key).digest(),
        "perceptual_hash": int.from_bytes(hashlib.sha256(b"looks " + key).digest()[:8], "big"),
        "kept_back": False,
        "held_out": False,
    }
    return known | dict(row)


def episode_row(pictures: Sequence[str], names: Sequence[str], question: str = "This is") -> dict[str, Any]:
    """An EPISODE row that shows all pictures but the last under `names`, and asks about the last."""
    turns = [
        {"picture": picture, "question": question, "answer": name, "scored": False}
        for picture, name in zip(pictures, names, strict=True)
    ]
    turns[-1]["scored"] = True
    return {
        "episode": 0,
        "task": "link",
        "shots_of_both_classes": len(pictures) - 1,
        "concepts": [],
        "names": sorted(set(names)),
        "turns": turns,
        "answer": names[-1],
        "other": next((name for name in names if name != names[-1]), ""),
    }


def random_pictures(pictures: Iterable[str], backbone: HuggingFaceBackbone) -> dict[str, PreparedPicture]:
    """Visual tokens that no picture made, by key."""
    rng = np.random.default_rng(0)
    (prepared,) = backbone.prepare([draw_picture(0)])
    shape = (len(prepared.ids), backbone.width)
    return {
        key: PreparedPicture(prepared.ids, features=rng.normal(size=shape).astype(np.float16))
        for key in pictures
    }


@cache
def _nano_processor() -> Any:
    return build_nano(["red cat", "blue cup"], [*SYLLABLES, "This is"]).processor


def tiny_backbone(seed: int = 0, width: int = 32) -> HuggingFaceBackbone:
    """An untrained LLaVA of two layers each, with nano's tokenizer and chat template."""
    processor = _nano_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=70,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            # Wider than the default, so that hidden states of different texts are clearly different.
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return HuggingFaceBackbone(LlavaForConditionalGeneration(config), processor, identity=f"tiny-{seed}")


class PlainEngine:
    """`training.step.Engine` on one process, by torch alone."""

    rank, world_size = 0, 1
    spreads_parameters = False

    def __init__(self, method: Method, micro_batches: int = 1, learning_rate: float = 1e-3) -> None:
        self._method = method
        self.micro_batches = micro_batches
        self._peak = learning_rate
        self._optimizer = torch.optim.AdamW(method.trainable().values(), weight_decay=0.0)
        self.gradients: Mapping[str, Tensor] = {}
        """What the last step followed, by parameter name."""

    def forward(self, batch: Any) -> Tensor:
        """Negative log-likelihood of every scored target."""
        nll: Tensor = self._method(batch)
        return nll

    def backward(self, loss: Tensor) -> None:
        """Add a gradient."""
        loss.backward()

    def step(self, rate: float) -> float:
        """Average over the micro-batches, as DeepSpeed does, and update."""
        for parameter in self._parameters():
            parameter.grad /= self.micro_batches
        named = self._method.trainable()
        self.gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm([*self.gradients.values()])
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * rate
        if norm.isfinite():
            self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """There is one worker."""
        return [list(values)]

    def _parameters(self) -> Iterator[Any]:
        return (p for p in self._method.trainable().values() if p.grad is not None)

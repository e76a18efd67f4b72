"""What training reads: episodes and frozen features, each made once and reused while unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, backbone_identity, load_backbone
from mmicl_core.backbones.induction import start_projector
from mmicl_core.backbones.nano import build_nano, whiten_patches
from mmicl_core.config.model import BackboneConfig, LclConfig, SupConConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.episodes import DESCRIBE_QUESTION, NAME_QUESTION
from mmicl_core.data.names import SYLLABLES
from mmicl_core.data.pictures import PictureStore, read_metadata
from mmicl_core.data.splits import Split
from mmicl_core.errors import ConfigError
from mmicl_core.methods import METHODS
from mmicl_core.methods.supcon import load_vision_tower, tower_identity
from pipelines.episodes import build_episodes, read_episodes, read_pairs
from pipelines.features import encode_demonstrations, encode_pictures, teach_pictures
from pipelines.stages import Stage

__all__ = ["Materials", "open_backbone", "prepare"]

NEW_NANO = "new:nano"
MEASURED_PICTURES = 1500
QUESTIONS = ("This is", "What is this?", NAME_QUESTION, DESCRIBE_QUESTION)


@dataclass(frozen=True)
class Materials:
    """Where the workers find what they read; every folder is complete before they start."""

    backbone: Path
    pairs: Path
    corpus: Path
    episodes: Path | None = None
    features: Path | None = None
    states: Path | None = None

    def names(self) -> dict[str, str]:
        """What the materials are, wherever they lie: folder names end in fingerprints."""
        names = {name: path.name for name, path in vars(self).items() if path is not None}
        return names | {"backbone": backbone_identity(self.backbone)}

    def plain(self) -> dict[str, str]:
        """For the way to another process."""
        return {name: str(path) for name, path in vars(self).items() if path is not None}


def prepare(run: RunConfig, root: Path) -> Materials:
    """Make whatever the method of `run` reads and is not there yet.

    Raises:
        ConfigError: the run would train on what is held out.
    """
    if run.episodes.part != "train":
        raise ConfigError(
            f"episodes.part is {run.episodes.part!r}, which is held out from training: leave it at 'train'"
        )
    corpus = resolve(run.corpus.path)
    split = Split.load(corpus)
    pairs = read_pairs(corpus, root)
    backbone = open_backbone(run.backbone, pairs, split, root)
    if isinstance(run.method, SupConConfig):
        features = None
        if run.method.teacher is not None:
            train_on = [row["picture"] for row in _training_rows(pairs, split)]
            teacher = resolve(run.method.teacher)
            features = teach_pictures(pairs, teacher, run.method.teacher_pixels, train_on, root).folder
        return Materials(backbone, pairs.folder, corpus, features=features)
    episodes = build_episodes(pairs, split, run.episodes, root)
    rows = read_episodes(episodes.folder)
    states = None
    if METHODS[run.method.type].needs_states:
        states = encode_demonstrations(pairs, backbone, rows, episodes.fingerprint, root).folder
    if isinstance(run.method, LclConfig) and run.method.train_vision_tower:
        return Materials(backbone, pairs.folder, corpus, episodes.folder)
    # A demonstration whose states are known is never looked at again; its query is.
    turns = [turn for row in rows for turn in (row["turns"][-1:] if states else row["turns"])]
    variants = run.train.picture_variants
    seen = sorted({turn["picture"] for turn in turns})
    features = encode_pictures(pairs, backbone, seen, variants, root).folder
    return Materials(backbone, pairs.folder, corpus, episodes.folder, features, states)


def open_backbone(config: BackboneConfig, pairs: Stage, split: Split, root: Path) -> Path:
    """The folder of a model; one that is new, or gets another tower, is written first."""
    is_new = config.path == NEW_NANO
    if not is_new and config.vision_tower is None:
        return resolve(config.path)
    stage = Stage(
        root,
        "backbone",
        # A new model is made out of the pairs; another one is what lies in its folder.
        model=[NEW_NANO, pairs.fingerprint] if is_new else backbone_identity(resolve(config.path)),
        tower=tower_identity(resolve(config.vision_tower)) if config.vision_tower else None,
    )

    def build(folder: Path) -> dict[str, int]:
        pictures = _some_pictures(pairs, split) if is_new else []
        backbone = _new_nano(pairs, split, pictures) if is_new else load_backbone(resolve(config.path))
        if config.vision_tower is not None:
            load_vision_tower(resolve(config.vision_tower), backbone)
        if is_new:
            start_projector(backbone, pictures, seed=0)
        backbone.save(folder)
        return {"parameters": sum(parameter.numel() for parameter in backbone.parameters())}

    stage.run(build)
    return stage.folder


def _training_rows(pairs: Stage, split: Split) -> list[dict[str, Any]]:
    return [row for row in read_metadata(pairs.folder) if split.trains_on(row["concept"], row["style"])]


def _some_pictures(pairs: Stage, split: Split) -> list[Image.Image]:
    rows, store = _training_rows(pairs, split), PictureStore(pairs.folder)
    return [store.picture(row["picture"]) for row in rows[:: max(1, len(rows) // MEASURED_PICTURES)]]


def _new_nano(pairs: Stage, split: Split, pictures: list[Image.Image]) -> HuggingFaceBackbone:
    texts = []
    for row in _training_rows(pairs, split):
        texts += [row["name"], row["subcategory"].replace("-", " "), *row["keywords"]]
    backbone = build_nano(texts, [*SYLLABLES, *QUESTIONS])
    whiten_patches(backbone, pictures)
    return backbone

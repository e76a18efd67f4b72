"""What training reads: episodes and frozen features, each made once and reused while unchanged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from PIL import Image

from mmicl_core.assets import resolve
from mmicl_core.backbones.families import family_in
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone, backbone_identity, load_backbone
from mmicl_core.backbones.induction import start_projector
from mmicl_core.backbones.nano import build_nano, whiten_patches
from mmicl_core.config.model import AimConfig, BackboneConfig, SupConConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.images import decode
from mmicl_core.data.names import SYLLABLES
from mmicl_core.data.tasks.caption import DESCRIBE_QUESTION, NAME_QUESTION
from mmicl_core.errors import ConfigError
from mmicl_core.methods import METHODS
from mmicl_core.methods.supcon import load_vision_tower, tower_identity
from pipelines.catalogue import Described
from pipelines.episodes import PoolFolders, Source, build_episodes, describe, pool_folders
from pipelines.features import encode_demonstrations, encode_pictures, teach_pictures
from pipelines.stages import Stage

__all__ = ["Materials", "open_backbone", "prepare", "prepare_held_out", "training_rows"]

NEW_NANO = "new:nano"
MEASURED_PICTURES = 1500
QUESTIONS = ("This is", "What is this?", NAME_QUESTION, DESCRIBE_QUESTION)


@dataclass(frozen=True)
class Materials:
    """Where the workers find what they read; every folder is complete before they start."""

    backbone: Path
    pairs: Path
    catalogue: Path
    episodes: Path | None = None
    features: Path | None = None
    states: Path | None = None
    drawn_from: PoolFolders | None = None
    """Where streamed episodes are drawn from, which are not written."""

    def names(self) -> dict[str, Any]:
        """What the materials are, wherever they lie: folder names end in fingerprints."""
        paths = {name: path.name for name, path in vars(self).items() if isinstance(path, Path)}
        drawn_from = self.drawn_from.names if self.drawn_from is not None else None
        return paths | {"backbone": backbone_identity(self.backbone), "drawn_from": drawn_from}


def prepare(run: RunConfig, root: Path) -> Materials:
    """Make whatever the method of `run` reads and is not there yet.

    Raises:
        ConfigError: the run would train on what is held out.
    """
    if run.episodes.part != "train":
        raise ConfigError(
            f"episodes.part is {run.episodes.part!r}, which is held out from training: leave it at 'train'"
        )
    return _prepare(run, root)


def prepare_held_out(run: RunConfig, root: Path) -> tuple[RunConfig, Materials] | None:
    """What a run validates on, and the run as it reads that; None where it does not validate."""
    asked = run.train.validation
    if asked.every is None:
        return None
    stage = run.episodes.stages[0].model_copy(update={"episodes": asked.episodes})
    episodes = run.episodes.model_copy(
        update={"part": asked.part, "stages": (stage,), "streamed": False, "preset": None}
    )
    plain = run.train.model_copy(update={"picture_variants": 1})
    held_out = run.model_copy(update={"episodes": episodes, "train": plain})
    return held_out, _prepare(held_out, root)


def _prepare(run: RunConfig, root: Path) -> Materials:
    source = describe(run, root)
    concepts = source.catalogue("concept")
    backbone = open_backbone(run.backbone, source, root)
    common = Materials(backbone, source.described.pairs.folder, concepts.folder)
    if isinstance(run.method, SupConConfig):
        if run.method.teacher is None:
            return common
        teacher, side = resolve(run.method.teacher), run.method.teacher_pixels
        return replace(common, states=teach_pictures(source.described, teacher, side, concepts, root).folder)
    if run.episodes.streamed:
        # Which pictures a step meets is not known before; the workers look at them.
        return replace(common, drawn_from=pool_folders(source, run.episodes))
    episodes = build_episodes(source, run.episodes, root)
    materials, described = replace(common, episodes=episodes.folder), source.described
    if isinstance(run.method, AimConfig):
        states = encode_demonstrations(described, backbone, episodes, root, run.method)
        materials = replace(materials, states=states.folder)
    takes = METHODS[run.method.type].takes
    if takes == "pixels" or (takes == "visual_tokens" and family_in(backbone).instructed):
        return materials
    seen = encode_pictures(
        described,
        backbone,
        episodes,
        root,
        takes=takes,
        variants=run.train.picture_variants,
        # A demonstration whose states are known is never looked at again.
        queries_only=materials.states is not None,
    )
    return replace(materials, features=seen.folder)


def open_backbone(config: BackboneConfig, source: Source, root: Path) -> Path:
    """The folder of a model; one that is new, or gets another tower, is written first."""
    is_new = config.path == NEW_NANO
    if not is_new and config.vision_tower is None:
        return resolve(config.path)
    stage = Stage(
        root,
        "backbone",
        # A new model is made out of the pictures; another one is what lies in its folder.
        model=[NEW_NANO, source.catalogue("concept").fingerprint]
        if is_new
        else backbone_identity(resolve(config.path)),
        tower=tower_identity(resolve(config.vision_tower)) if config.vision_tower else None,
    )

    catalogue = source.catalogue("concept").folder
    tower = resolve(config.vision_tower) if config.vision_tower is not None else None
    start = None if is_new else resolve(config.path)

    def build(folder: Path) -> dict[str, int]:
        write = ray.remote(_write_backbone).options(num_cpus=1)
        counts: dict[str, int] = ray.get(write.remote(source.described, catalogue, start, tower, folder))
        return counts

    stage.run(build)
    return stage.folder


def _write_backbone(
    described: Described, catalogue: Path, start: Path | None, tower: Path | None, folder: Path
) -> dict[str, int]:
    """A model as it lies in `start`, or a new one made out of the pictures of a catalogue."""
    rows = [] if start else training_rows(catalogue)
    reader = described.corpus.pictures(described.pairs.folder)
    some = rows[:: max(1, len(rows) // MEASURED_PICTURES)]
    pictures = [decode(reader.read(row["image"])) for row in some]
    backbone = load_backbone(start) if start else _new_nano(rows, pictures)
    if tower is not None:
        load_vision_tower(tower, backbone)
    if start is None:
        start_projector(backbone, pictures, seed=0)
    backbone.save(folder)
    return {"parameters": sum(parameter.numel() for parameter in backbone.parameters())}


def training_rows(catalogue: Path) -> list[dict[str, Any]]:
    """The pictures of a catalogue of concepts that training may see, in the order of their keys."""
    opened = Catalogue(catalogue)
    groups = [group for group in range(len(opened)) if not opened.held_out[group]]
    numbers = [number for group in groups for number in opened.pictures(group)]
    columns = ("picture", "image", "concept", "name", "keywords", "category", "subcategory", "style")
    rows: list[dict[str, Any]] = opened.take(numbers, columns).sort_by("picture").to_pylist()
    return rows


def _new_nano(rows: list[dict[str, Any]], pictures: list[Image.Image]) -> HuggingFaceBackbone:
    texts = []
    for row in rows:
        subcategory = (row["subcategory"] or "").replace("-", " ")
        texts += [row["name"], subcategory, *(row["keywords"] or ())]
    backbone = build_nano(list(filter(None, texts)), [*SYLLABLES, *QUESTIONS])
    whiten_patches(backbone, pictures)
    return backbone

"""Settings of the tasks that an evaluation asks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmicl_core.config.base import Config
from mmicl_core.config.episodes import Part

__all__ = [
    "CaptionsConfig",
    "ClassificationConfig",
    "HatefulMemesConfig",
    "ImageNetPairsConfig",
    "IsekaiConfig",
    "KindsConfig",
    "MmeConfig",
    "NamingConfig",
    "PopeConfig",
    "SnliVeConfig",
    "TaskSettings",
    "VlIclConfig",
    "VqaConfig",
    "VsrConfig",
]


class _OfCorpus(Config):
    part: Part = "held_out_concepts"
    """Pictures that the queries come from."""


class NamingConfig(_OfCorpus):
    """Which of two made-up names a novel concept of the corpus has."""

    type: Literal["two_way"] = "two_way"


class KindsConfig(_OfCorpus):
    """What kind of thing a picture of the corpus shows; one demonstration is of its kind."""

    type: Literal["kind"] = "kind"


class _OfFiles(Config):
    folder: str
    """Where the data set lies, in its published layout."""


class IsekaiConfig(_OfFiles):
    """ISEKAI: concepts that do not exist, against real ones (`ten`) or each other (`pair`)."""

    type: Literal["isekai"] = "isekai"
    split: Literal["ten", "pair"] = "ten"


class ImageNetPairsConfig(_OfFiles):
    """ImageNet-100 2-way, classes paired in the order of their list."""

    type: Literal["imagenet_pairs"] = "imagenet_pairs"


class VlIclConfig(_OfFiles):
    """One task of VL-ICL Bench."""

    type: Literal["vl_icl"] = "vl_icl"
    task: Literal[
        "open_mi",
        "operator_induction",
        "operator_induction_interleaved",
        "clevr",
        "textocr",
        "matching_mi",
    ] = "open_mi"


class VqaConfig(_OfFiles):
    """Visual question answering, scored by the official accuracy."""

    type: Literal["vqa"] = "vqa"
    dataset: Literal["vqav2", "ok_vqa", "vizwiz", "textvqa"] = "vqav2"


class CaptionsConfig(_OfFiles):
    """Captions, scored by CIDEr."""

    type: Literal["captions"] = "captions"
    dataset: Literal["coco", "flickr30k"] = "coco"


class HatefulMemesConfig(_OfFiles):
    """Hateful Memes, scored by the area under the ROC curve of log-probabilities."""

    type: Literal["hateful_memes"] = "hateful_memes"


class MmeConfig(_OfFiles):
    """MME: two yes-no questions about each picture."""

    type: Literal["mme"] = "mme"


class VsrConfig(_OfFiles):
    """Visual Spatial Reasoning."""

    type: Literal["vsr"] = "vsr"
    split: Literal["random", "zeroshot"] = "random"


class SnliVeConfig(_OfFiles):
    """SNLI-VE: does a picture entail a sentence?"""

    type: Literal["snli_ve"] = "snli_ve"
    split: Literal["dev", "test"] = "test"


class PopeConfig(_OfFiles):
    """POPE: is an object there, by one of three ways to choose objects that are not."""

    type: Literal["pope"] = "pope"
    split: Literal["random", "popular", "adversarial"] = "adversarial"


class ClassificationConfig(_OfFiles):
    """A classification data set as a question with its class names."""

    type: Literal["classification"] = "classification"
    dataset: Literal["cifar10", "cifar100", "mnist"] = "cifar10"


TaskSettings = Annotated[
    NamingConfig
    | KindsConfig
    | IsekaiConfig
    | ImageNetPairsConfig
    | VlIclConfig
    | VqaConfig
    | CaptionsConfig
    | HatefulMemesConfig
    | MmeConfig
    | VsrConfig
    | SnliVeConfig
    | PopeConfig
    | ClassificationConfig,
    Field(discriminator="type"),
]

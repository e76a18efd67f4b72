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
    "TrueNamesConfig",
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


class TrueNamesConfig(_OfCorpus):
    """What the corpus itself calls what a picture shows; nothing is demonstrated."""

    type: Literal["true_name"] = "true_name"


class _OfFiles(Config):
    folder: str
    """Where the data set lies, in its published layout."""


class IsekaiConfig(_OfFiles):
    """ISEKAI: concepts that do not exist, against real ones (`ten`) or each other (`pair`)."""

    type: Literal["isekai"] = "isekai"
    split: Literal["ten", "pair"] = "ten"
    """`ten` sets novel concepts against real ones, `pair` against each other."""


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
    """Which task; `mmicl_core.evaluation.tasks.vl_icl` says what each asks."""


class VqaConfig(_OfFiles):
    """Visual question answering, scored by the official accuracy."""

    type: Literal["vqa"] = "vqa"
    dataset: Literal["vqav2", "ok_vqa", "vizwiz", "textvqa"] = "vqav2"
    """Whose questions."""


class CaptionsConfig(_OfFiles):
    """Captions, scored by CIDEr."""

    type: Literal["captions"] = "captions"
    dataset: Literal["coco", "flickr30k"] = "coco"
    """Whose pictures, in Karpathy's split."""


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
    """Whether concepts of the test are also trained on."""


class SnliVeConfig(_OfFiles):
    """SNLI-VE: does a picture entail a sentence?"""

    type: Literal["snli_ve"] = "snli_ve"
    split: Literal["dev", "test"] = "test"
    """Which file has the queries."""


class PopeConfig(_OfFiles):
    """POPE: is an object there, by one of three ways to choose objects that are not."""

    type: Literal["pope"] = "pope"
    split: Literal["random", "popular", "adversarial"] = "adversarial"
    """How objects that are not there were chosen."""


class ClassificationConfig(_OfFiles):
    """A classification data set as a question with its class names."""

    type: Literal["classification"] = "classification"
    dataset: Literal["cifar10", "cifar100", "mnist"] = "cifar10"
    """Whose pictures and classes."""


TaskSettings = Annotated[
    NamingConfig
    | KindsConfig
    | TrueNamesConfig
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

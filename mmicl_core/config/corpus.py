"""Settings of the corpus, of its concepts, and of where hard negatives come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mmicl_core.config.base import Config

__all__ = [
    "ClassFoldersConfig",
    "ConceptConfig",
    "CorpusConfig",
    "DualEncoderConfig",
    "EmbedderConfig",
    "FetchConfig",
    "FieldNames",
    "LlavaConfig",
    "Mmc4Config",
    "NeighbourConfig",
    "ObelicsConfig",
    "ParquetConfig",
    "ReaderConfig",
    "TextConfig",
    "VisionTowerConfig",
    "WebdatasetConfig",
]


class FieldNames(Config):
    """What a corpus calls the things that PAIR has a column for; a name that is absent is no error."""

    caption: str = "caption"
    """Field or column of the caption; a webdataset sample's `.txt` comes before it."""

    label: str = "concept"
    """Field or column that names the concept."""

    task: str = "task_name"
    """Field or column that names the task of an instruction."""


class WebdatasetConfig(Config):
    """Tar shards as img2dataset and DataComp write them: jpg, png or webp, with txt and json."""

    type: Literal["webdataset"] = "webdataset"

    fields: FieldNames = FieldNames()
    """Names of the fields of a sample's JSON."""


class ParquetConfig(Config):
    """Parquet files with one picture a row."""

    type: Literal["parquet"] = "parquet"

    image: str | None = "image"
    """Column of the encoded picture: binary, or a struct with `bytes`, as Hugging Face datasets write it."""

    file: str | None = None
    """Column with the path of the picture, relative to `corpus.images`."""

    url: str | None = None
    """Column with the picture's URL, which `corpus.fetch` then loads."""

    key: str | None = None
    """Column whose value names the row; None takes the number of the row in its file."""

    fields: FieldNames = FieldNames()
    """Names of the other columns."""

    @model_validator(mode="after")
    def _pictures_come_from_one_column(self) -> Self:
        given = [name for name in ("image", "file", "url") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"the picture of a row comes from one column, but {given or 'none'} are named: set one of "
                "image, file and url, and the others to none"
            )
        return self


class Mmc4Config(Config):
    """MMC4 (arXiv:2304.06939): jsonl documents of sentences, with pictures matched to them."""

    type: Literal["mmc4"] = "mmc4"

    min_similarity: float = Field(default=0.0, ge=-1, le=1)
    """Smallest CLIP similarity between a picture and its sentence, from the document's matrix."""


class ObelicsConfig(Config):
    """OBELICS (arXiv:2306.16527): Parquet of parallel lists `texts` and `images`."""

    type: Literal["obelics"] = "obelics"


class LlavaConfig(Config):
    """LLaVA's instruction JSON (Vision-Flan has the same form) with a folder of pictures."""

    type: Literal["llava"] = "llava"

    fields: FieldNames = FieldNames()
    """Names of an item's fields; only the task's counts here."""


class ClassFoldersConfig(Config):
    """A folder of class folders of picture files, as ImageNet lies on disk."""

    type: Literal["class_folders"] = "class_folders"

    names: str | None = None
    """JSON file of folder name -> class name; None takes the folder's own name, `_` as a space."""


ReaderConfig = Annotated[
    WebdatasetConfig | ParquetConfig | Mmc4Config | ObelicsConfig | LlavaConfig | ClassFoldersConfig,
    Field(discriminator="type"),
]


class FetchConfig(Config):
    """Loading pictures by URL: off unless asked for, and never from where it must not go."""

    enabled: bool = False
    """Load the URLs that the corpus names."""

    user_agent: str = "mmicl"
    """Name given to servers, and looked for in robots.txt and in X-Robots-Tag."""

    allowed_networks: tuple[str, ...] = ()
    """Networks, as `10.1.0.0/16`, that may be loaded from although they are not public."""

    timeout_seconds: float = Field(default=20.0, gt=0)
    """Longest time for one picture, redirects included."""

    max_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Largest picture, as sent."""

    max_redirects: int = Field(default=3, ge=0)
    """Redirects followed; each target is checked like the first URL."""

    concurrency: int = Field(default=16, ge=1)
    """Pictures that one worker loads at once."""


class CorpusConfig(Config):
    """Where the image-text pairs come from."""

    path: str = "embedded:open_emoji"
    """Folder, file or glob, local or of any filesystem that Arrow opens (s3://, gs://, hdfs://);
    `embedded:NAME` is one inside the package. A `split.json` beside the files names what is held out."""

    reader: ReaderConfig = WebdatasetConfig()
    """What the files are."""

    images: str | None = None
    """Folder of the picture files that the corpus names by path, or of MMC4's picture shards."""

    fetch: FetchConfig = FetchConfig()
    """Loading what the corpus names by URL."""

    max_pixels: int = Field(default=64_000_000, ge=1)
    """Largest picture, decoded: a small file can hold a huge one."""

    max_skipped_share: float = Field(default=0.1, ge=0, le=1)
    """Share of samples that may be unusable; past it the run stops and says why."""

    max_repeats: int = Field(default=16, ge=1)
    """Most samples that may share one picture, byte for byte; above, it is taken for a placeholder."""

    identity: Literal["listing", "content"] = "listing"
    """What tells whether the corpus is the same as in an earlier run: the names, sizes and times of its
    files, or their content, which reads all of them once more and takes a local corpus. An embedded one is
    always told by its content."""

    rows_per_file: int = Field(default=4096, ge=1)
    """Pairs of one output file, and so of one piece of work."""

    @model_validator(mode="after")
    def _pictures_can_be_had(self) -> Self:
        reader = self.reader
        if isinstance(reader, ParquetConfig) and reader.url is not None and not self.fetch.enabled:
            raise ValueError(
                f"reader.url ({reader.url!r}) is a column of URLs, but fetch.enabled is false: set it to "
                "true to load them"
            )
        by_path = isinstance(reader, ParquetConfig) and reader.file is not None
        by_path = by_path or isinstance(reader, LlavaConfig)
        by_path = by_path or (isinstance(reader, Mmc4Config) and not self.fetch.enabled)
        if by_path and self.images is None:
            raise ValueError(
                f"reader {reader.type} names its pictures by path, but images is none: name their folder"
            )
        return self


class ConceptConfig(Config):
    """What a picture is a picture of."""

    by: Literal["label", "head_noun", "clusters"] = "label"
    """`label` takes what the corpus says; `head_noun` the noun that a caption is about; `clusters` groups
    the pairs' embeddings."""

    spacy_pipeline: str = "en_core_web_sm"
    """The spaCy pipeline that finds head nouns: the name of an installed package, or a folder."""

    clusters: int = Field(default=1000, ge=2)
    """Clusters of embeddings."""

    min_pictures: int = Field(default=2, ge=1)
    """Fewest distinct pictures of a concept; rarer ones are left out."""

    held_out_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of concepts kept for evaluation, chosen by hash, where the corpus has no `split.json`."""

    seed: int = 0
    """Seeds the clusters and what is held out."""


class DualEncoderConfig(Config):
    """A Hugging Face CLIP or SigLIP: pictures and texts in one space."""

    type: Literal["dual_encoder"] = "dual_encoder"

    path: str
    """Folder of the model."""

    batch: int = Field(default=64, ge=1)
    """Pictures or texts encoded at once."""


class VisionTowerConfig(Config):
    """The backbone's own vision tower, mean over its tokens, with a sentence encoder: two spaces."""

    type: Literal["vision_tower"] = "vision_tower"

    sentence_encoder: str | None = None
    """Folder of a Hugging Face text model; its mean token is the text's embedding. None: no texts."""

    batch: int = Field(default=64, ge=1)
    """Pictures or texts encoded at once."""


class TextConfig(Config):
    """A sentence encoder alone; pictures are compared by what is said of them."""

    type: Literal["text"] = "text"

    sentence_encoder: str
    """Folder of a Hugging Face text model."""

    batch: int = Field(default=64, ge=1)
    """Texts encoded at once."""


EmbedderConfig = Annotated[DualEncoderConfig | VisionTowerConfig | TextConfig, Field(discriminator="type")]


NEIGHBOUR_PRESETS: Mapping[Any, Mapping[str, Any]] = {
    "paper": {"count": 100, "choice": "intervals"},
    "released": {"count": 36, "choice": "released_intervals"},
}


class NeighbourConfig(Config):
    """Which concepts an episode may contrast a concept with (arXiv:2308.07891, section 3.2)."""

    by: Literal["taxonomy", "similarity"] = "taxonomy"
    """`taxonomy` takes the concepts of the same subcategory, most common keywords first, and needs no
    model; `similarity` compares embeddings."""

    count: int = Field(default=100, ge=1)
    """Neighbours kept for each concept, nearest first; the paper's N."""

    preset: Literal["paper", "released"] | None = None
    """`paper`: 100 of as many intervals. `released`: the 36 of the paper's code. It decides `count` and
    `choice`, where these are not given."""

    choice: Literal["nearest", "intervals", "released_intervals"] = "nearest"
    """`nearest` keeps the most similar ones; `intervals` sorts all others by similarity, cuts them into
    `count` intervals and draws one of each, as the paper does; `released_intervals` cuts them where the
    paper's code does, which counts the concept itself as the first of its first interval."""

    search: Literal["exact", "approximate"] = "exact"
    """`approximate` looks through an inverted file of Faiss, for many hundred thousand concepts."""

    text_text: float = 0.5
    """Weight of the similarity of the two names."""

    image_text: float = 0.8
    """Weight of the similarities of either picture with the other name; needs a dual encoder."""

    image_image: float = 0.5
    """Weight of the similarity of the pictures."""

    prototype_pictures: int = Field(default=100, ge=1)
    """Most pictures that are averaged into a concept's picture embedding."""

    seed: int = 0
    """Seeds the draw from the intervals and the pictures that are averaged."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        return {**NEIGHBOUR_PRESETS.get(preset, {}), **given} if preset else given

    @model_validator(mode="after")
    def _intervals_see_all(self) -> Self:
        if self.choice != "nearest" and self.search == "approximate":
            raise ValueError(
                "choice 'intervals' sorts all concepts by similarity, and search 'approximate' sees only the "
                "nearest: use 'nearest', or 'exact'"
            )
        return self

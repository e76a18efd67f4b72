"""What can be read: one file a kind of corpus, one row each here."""

from __future__ import annotations

from mmicl_core.config.corpus import (
    ClassFoldersConfig,
    CorpusConfig,
    LlavaConfig,
    Mmc4Config,
    ObelicsConfig,
    ParquetConfig,
    WebdatasetConfig,
)
from mmicl_core.data.readers.base import Reader
from mmicl_core.data.readers.class_folders import ClassFolderReader
from mmicl_core.data.readers.llava import LlavaReader
from mmicl_core.data.readers.mmc4 import Mmc4Reader
from mmicl_core.data.readers.obelics import ObelicsReader
from mmicl_core.data.readers.parquet import ParquetReader
from mmicl_core.data.readers.webdataset import WebdatasetReader
from mmicl_core.data.storage import Location

__all__ = ["READERS", "build_reader"]

READERS: dict[str, type[Reader]] = {
    "webdataset": WebdatasetReader,
    "parquet": ParquetReader,
    "mmc4": Mmc4Reader,
    "obelics": ObelicsReader,
    "llava": LlavaReader,
    "class_folders": ClassFolderReader,
}


def build_reader(location: Location, config: CorpusConfig, images: Location | None = None) -> Reader:
    """The reader that `config` asks for.

    Args:
        location: where `config.path` is.
        config: of the corpus.
        images: where `config.images` is; None if that is none.
    """
    match config.reader:
        case WebdatasetConfig() as reader:
            return WebdatasetReader(location, reader)
        case ParquetConfig() as reader:
            return ParquetReader(location, reader, images)
        case Mmc4Config() as reader:
            return Mmc4Reader(location, reader, images, fetch=config.fetch.enabled)
        case ObelicsConfig():
            return ObelicsReader(location)
        case LlavaConfig() as reader:
            assert images is not None, "the settings ask for the folder of the pictures"
            return LlavaReader(location, reader, images)
        case ClassFoldersConfig() as reader:
            return ClassFolderReader(location, reader)

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from mmicl_core.config.corpus import CorpusConfig, FetchConfig, ReaderConfig
from mmicl_core.data.readers import READERS, build_reader
from mmicl_core.data.storage import Location

KINDS = {config.model_fields["type"].default: config for config in get_args(get_args(ReaderConfig)[0])}


def test_every_kind_of_reader_that_can_be_configured_is_in_the_table() -> None:
    assert set(READERS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_reader_of_each_kind_is_built_as_its_settings_say(kind: str, tmp_path: Path) -> None:
    config = CorpusConfig(path=str(tmp_path), reader=KINDS[kind](), images=str(tmp_path))
    reader = build_reader(Location(str(tmp_path)), config, Location(str(tmp_path)))
    assert type(reader) is READERS[kind]


@pytest.mark.parametrize("enabled", [True, False])
def test_mmc4_reader_is_built_to_load_urls_only_if_fetching_is_enabled(enabled: bool, tmp_path: Path) -> None:
    document = (
        '{"text_list": ["a"], "image_info": [{"image_name": "a.jpg", "raw_url": "http://example.com/a.jpg", '
        '"matched_text_index": 0, "matched_sim": 0.3}]}'
    )
    (tmp_path / "docs.jsonl").write_text(document, encoding="utf-8")
    reader_config: Any = {"type": "mmc4"}
    fetch = FetchConfig(enabled=enabled)
    config = CorpusConfig(path=str(tmp_path), reader=reader_config, images=str(tmp_path), fetch=fetch)
    reader = build_reader(Location(str(tmp_path)), config, Location(str(tmp_path)))
    (row,) = (row for unit in reader.units() for row in reader.read(unit))
    assert (row.skipped is None) == enabled

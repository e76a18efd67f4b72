"""What there is to encode, gathered from files by a real Ray and handed to a pool."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmicl_core.data.arrow_files import read_arrow, write_arrow
from mmicl_core.data.schema import EPISODE
from mmicl_core.prompts import Turn, demonstration_key
from pipelines.parts import Counts, Pool
from pipelines.stages import Stage, read_manifest
from pipelines.wanted import KEY, demonstrations, encode_parts

pytestmark = pytest.mark.usefixtures("ray_cluster")


class _Lengths:
    """Writes down the length of each key, as a model would its features."""

    def __call__(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        keys = read_arrow(Path(part["list"])).slice(part["start"], part["size"]).column(KEY)
        file = f"{part['name']}.arrow"
        write_arrow(folder / file, pa.table({"key": keys, "length": [len(key) for key in keys.to_pylist()]}))
        return {file: len(keys)}, {"rows": len(keys)}


def _episodes(root: Path, *files: list[list[str]]) -> Stage:
    """Files of episodes, each the answers of its turns."""
    stage = Stage(root, "episodes")

    def build(folder: Path) -> dict[str, Any]:
        for number, episodes in enumerate(files):
            rows = [
                {"turns": [{"picture": "a", "question": "This is", "answer": answer} for answer in answers]}
                for answers in episodes
            ]
            pq.write_table(pa.Table.from_pylist(rows, EPISODE), folder / f"episodes-{number:05d}.parquet")
        return {"files": {path.name: {} for path in sorted(folder.iterdir())}}

    stage.run(build)
    return stage


def _encode(root: Path, episodes: Stage, most: int) -> tuple[Stage, list[str]]:
    stage = encode_parts(
        Stage(root, "lengths"),
        "Measuring",
        episodes,
        "episodes-*.parquet",
        demonstrations,
        Pool(_Lengths, ()),
        most=most,
        row_bytes=lambda rows: 8 * (rows.num_rows > 0),
    )
    keys = [
        key for file in stage.folder.glob("*.arrow") for key in read_arrow(file).column("key").to_pylist()
    ]
    return stage, sorted(keys)


def test_what_several_files_show_is_encoded_once_and_the_lists_are_gone(tmp_path: Path) -> None:
    episodes = _episodes(tmp_path, [["bako", "mute", "q"], ["bako", "q"]], [["mute", "sidu", "q"]])
    # More than a bucket holds, so that there are several.
    stage, keys = _encode(tmp_path, episodes, most=200_000)
    assert keys == [demonstration_key(Turn(("a",), "This is", answer)) for answer in ("bako", "mute", "sidu")]
    assert read_manifest(stage.folder)["rows"] == 3
    assert not list(stage.folder.glob("wanted-*"))


def test_episodes_without_demonstrations_give_an_empty_store(tmp_path: Path) -> None:
    stage, keys = _encode(tmp_path, _episodes(tmp_path, [["q"], ["q"]]), most=2)
    assert keys == [] and list(stage.folder.glob("features-*.arrow"))
    assert read_manifest(stage.folder)["rows"] == 0

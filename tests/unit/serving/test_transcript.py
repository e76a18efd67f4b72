"""Tokens -> pieces of text: joined they are the answer, and nothing has to be taken back."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mmicl_core.backbones.processors import load_processor
from mmicl_core.serving import transcript as module
from mmicl_core.serving.sampling import Likelihood
from mmicl_core.serving.transcript import HALF, TokenTexts, Told, Transcript
from tests.fakes import tiny_backbone
from tests.families import write_model

WORDS = (
    "  caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}\N{CJK UNIFIED IDEOGRAPH-4E2D} bako, mute. \n"
)


@pytest.fixture(scope="module", params=["tiny", "llava", "qwen3_vl"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "tiny":
        return tiny_backbone().tokenizer
    folder = tmp_path_factory.mktemp(request.param)
    write_model(request.param, folder)
    return load_processor(folder).tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def told(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Transcript]:
    transcript, pieces = Transcript(tokenizer, stop), list[str]()
    for token in ids:
        pieces.append(transcript.add(token).text)
        if transcript.stopped:
            return pieces, transcript
    return [*pieces, transcript.end().text], transcript


def test_pieces_joined_are_the_text_of_all_tokens_without_white_space_around(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, WORDS * 9)
    pieces, transcript = told(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert not any(HALF in piece for piece in pieces)
    assert transcript.tokens == len(ids) and not transcript.stopped
    assert sum(bool(piece) for piece in pieces) > 9


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_any_tokens_are_their_text(tokenizer: Any, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(len(tokenizer)) for _ in range(300)]
    joined, whole = "".join(told(tokenizer, ids)[0]), tokenizer.decode(ids, skip_special_tokens=True).strip()
    # Bytes that are no characters may be told one by one or as one.
    assert joined.replace(HALF, "") == whole.replace(HALF, "")


def test_half_characters_to_the_end_are_told_at_the_end_alone() -> None:
    tokenizer = tiny_backbone().tokenizer
    ids = ids_of(tokenizer, "so \N{GRINNING FACE}")[:-1]
    pieces, _ = told(tokenizer, ids)
    assert "".join(pieces) == f"so {HALF}" and HALF not in "".join(pieces[:-1])
    garbage = ids_of(tokenizer, "\N{GRINNING FACE}")[1:2] * 500
    assert "".join(told(tokenizer, garbage)[0]) == HALF * 500


def test_cost_of_a_token_does_not_grow_with_the_answer(tokenizer: Any, monkeypatch: Any) -> None:
    lengths = list[int]()
    decode = module._Characters._decode

    def watched(self: Any, tokens: Any) -> str:
        lengths.append(len(tokens))
        return decode(self, tokens)

    monkeypatch.setattr(module._Characters, "_decode", watched)
    told(tokenizer, ids_of(tokenizer, WORDS * 40))
    told(tokenizer, ids_of(tokenizer, "\N{GRINNING FACE}")[1:2] * 500)
    assert max(lengths) <= module.LONGEST_WINDOW


@pytest.mark.parametrize(
    ("stop", "answer"),
    [
        (("stop",), "one two."),
        (("two. stop here", "top"), "one two. s"),
        (("two. stop here", "and"), "one"),
        (("not there", "one two. st_p"), "one two. stop here, stop"),
        (("here", ", "), "one two. stop"),
        (("one",), ""),
        ((" ",), "one"),
        (("",), "one two. stop here, stop"),
        (("stop here, stop and more",), "one two. stop here, stop"),
    ],
)
def test_answer_ends_before_the_first_stop_text_and_nothing_of_it_was_told(
    tokenizer: Any, stop: tuple[str, ...], answer: str
) -> None:
    ids = ids_of(tokenizer, "one two. stop here, stop")
    pieces, transcript = told(tokenizer, ids, stop)
    text = "".join(pieces)
    assert text == answer
    assert transcript.stopped == (text != "one two. stop here, stop")
    assert transcript.tokens <= len(ids)


def test_text_that_may_begin_a_stop_is_told_when_it_turns_out_not_to() -> None:
    tokenizer = tiny_backbone().tokenizer
    transcript, pieces = Transcript(tokenizer, ("bab!",)), list[str]()
    for letter in "xbabab?":
        (token,) = ids_of(tokenizer, letter)
        pieces.append(transcript.add(token).text)
    assert pieces == ["x", "", "", "", "ba", "", "bab?"]
    assert transcript.end() == Told("", ())


def test_likelihoods_come_with_the_text_of_their_tokens_and_those_of_a_stop_text_never() -> None:
    tokenizer = tiny_backbone().tokenizer
    transcript, came = Transcript(tokenizer, ("b!",)), list[str]()
    ids = [ids_of(tokenizer, letter)[0] for letter in "abab!"]
    for token in ids:
        told_now = transcript.add(token, Likelihood(token, -1.0, ()))
        came.append("".join(tokenizer.decode([one.token]) for one in told_now.likelihoods))
    assert came == ["a", "", "ba", "", ""]
    assert transcript.stopped and transcript.tokens == 5


def test_every_token_of_a_character_of_several_has_its_likelihood_told() -> None:
    tokenizer = tiny_backbone().tokenizer
    ids = ids_of(tokenizer, "\N{GRINNING FACE}a")
    transcript, came = Transcript(tokenizer), list[int]()
    for token in ids:
        came += [one.token for one in transcript.add(token, Likelihood(token, 0.0, ())).likelihoods]
    assert came == ids


def test_text_of_a_token_is_what_it_adds_to_an_answer(tokenizer: Any) -> None:
    texts = TokenTexts(tokenizer)
    ids = ids_of(tokenizer, "bako, mute and so")
    assert "".join(texts.text(token) for token in ids).strip() == "bako, mute and so"
    assert texts.text(tokenizer.eos_token_id) == tokenizer.eos_token

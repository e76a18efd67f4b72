from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from mmicl_core.evaluation.vqa_accuracy import RESTORED, normalised, vqa_accuracy

PUNCTUATION = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`"]
PUNCTUATION += [",", "?", "!"]
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
DIGITS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
SPELT = {"dont": "don't", "whats": "what's", "oclock": "o'clock", "couldnt've": "couldn't've"}


def _slow_accuracy(answer: str, references: Sequence[str]) -> float:
    """The definition step by step: leave each person out in turn."""
    if any(reference != references[0] for reference in references):
        answer = _slow_words(answer)
        references = [_slow_words(reference) for reference in references]
    total = 0.0
    for left_out in range(len(references)):
        others = [*references[:left_out], *references[left_out + 1 :]]
        same = 0
        for other in others:
            same += other == answer
        total += 1.0 if same >= 3 else same / 3
    return total / len(references)


def _slow_words(text: str) -> str:
    triples = zip(text, text[1:], text[2:], strict=False)
    comma = any(a.isdigit() and b == "," and c.isdigit() for a, b, c in triples)
    kept = ""
    for letter in text:
        if letter not in PUNCTUATION:
            kept += letter
        elif not comma and letter + " " not in text and " " + letter not in text:
            kept += " "
    spoken = ""
    for place, letter in enumerate(kept):
        if letter != "." or kept[place + 1 : place + 2].isdigit():
            spoken += letter
    words = []
    for word in spoken.lower().split():
        word = DIGITS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(SPELT.get(word, word))
    return " ".join(words)


@pytest.mark.parametrize(("said", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_accuracy_is_the_mean_over_ten_people_of_the_share_among_the_nine_others(
    said: int, accuracy: float
) -> None:
    # By hand: of 3 who said it, each has 2 others that did, and the other 7 have 3: (3 * 2/3 + 7) / 10.
    references = ["red"] * said + ["blue"] * (10 - said)
    assert vqa_accuracy("red", references) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("A dog!", "dog"),
        ("The the an", ""),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("t-shirt", "t shirt"),
        ("red-white, blue", "red white blue"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("3.5 m.", "3.5 m"),
        (".5", ".5"),
        ("10:30 a.m.", "10:30 am"),
        ("girl's", "girl's"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont walk", "don't walk"),
        ("she'dve", "she'd've"),
        ("yall'd've", "y'all'd've"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("Im shed", "im shed"),
        ("yes" + "." * 40, "yes" + "." * 8),
        ("new\nyork\tcity", "new york city"),
    ],
)
def test_normalised_answer_is_what_the_official_code_makes_of_it(answer: str, left: str) -> None:
    assert normalised(answer) == left


def test_contractions_are_those_of_the_official_table_that_lower_case_text_can_have() -> None:
    # Its 120 entries without four in capitals and two that change nothing.
    assert len(RESTORED) == 114
    assert all(word.replace("'", "") == whole.replace("'", "") for word, whole in RESTORED.items())


def test_answer_to_a_unanimous_question_is_compared_as_it_is() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
    assert vqa_accuracy("one way", ["one way"] * 10) == 1
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


def test_accuracy_agrees_with_the_definition_on_odd_answers() -> None:
    rng = random.Random(3)
    pieces = [
        "a",
        "The",
        "dont",
        "whats",
        "oclock",
        "couldnt've",
        "two",
        "None",
        "1,000",
        "3.5",
        "u.s.",
        "red",
    ]
    pieces += ["t-shirt", "red/white", "(left)", "what?!", "10:30", "girl's", "...", "é", "-", ",", '"', "\\"]
    for _ in range(2000):
        said = [" ".join(rng.choices(pieces, k=rng.randint(0, 3))) for _ in range(rng.randint(1, 4))]
        references = rng.choices(said, k=10)
        answer = rng.choice([*said, *map(str.upper, said), "red"])
        assert vqa_accuracy(answer, references) == pytest.approx(_slow_accuracy(answer, references))

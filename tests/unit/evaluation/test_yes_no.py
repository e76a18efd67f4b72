from __future__ import annotations

import pytest

from mmicl_core.evaluation.tasks.base import Item
from mmicl_core.evaluation.yes_no import exchange_yes_no, said_at_once, said_in_first_sentence


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("YES, it is.", "yes"),
        ("No\nbecause", "no"),
        # What the script of MME makes of these is odd, and kept.
        (" yes", "yes"),
        ("  yes", "other"),
        ("It is: yes", "other"),
        ("Not sure", "no"),
        ("know", "no"),
        ("Noyes", "no"),
        ("", "other"),
        ("Maybe", "other"),
    ],
)
def test_first_four_characters_say_yes_before_no_before_neither(answer: str, said: str) -> None:
    assert said_at_once(answer) == said


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog", "no"),
        ("Yes. There is no cat, however.", "yes"),
        ("Well, no. Yes.", "no"),
        # What the script of POPE makes of these is odd, and kept.
        ("NO", "yes"),
        ("No!", "yes"),
        ("No\n", "yes"),
        ("none", "yes"),
        ("", "yes"),
        (".no", "yes"),
    ],
)
def test_first_sentence_says_no_only_with_a_negation_as_a_word(answer: str, said: str) -> None:
    assert said_in_first_sentence(answer) == said


def _mme_as_published(answer: str) -> str:
    """The three steps of MME's script, one by one."""
    answer = answer.lower()
    if answer == "yes" or answer == "no":
        return answer
    for said in ("yes", "no"):
        if any(answer[place : place + len(said)] == said for place in range(5 - len(said))):
            return said
    return "other"


def _pope_as_published(answer: str) -> str:
    """The steps of POPE's script, one by one."""
    sentence = ""
    for character in answer:
        if character == ".":
            break
        sentence += "" if character == "," else character
    while sentence:
        word, _, sentence = sentence.partition(" ")
        if word == "No" or word == "no" or word == "not":
            return "no"
    return "yes"


PIECES = ("yes", "no", "No", "not", "YES", "n", "o", " ", ".", ",", "\n", "")


@pytest.mark.parametrize("first", PIECES)
@pytest.mark.parametrize("second", PIECES)
def test_both_readings_agree_with_the_published_steps_on_odd_answers(first: str, second: str) -> None:
    for third in PIECES:
        answer = first + second + third
        assert said_at_once(answer) == _mme_as_published(answer)
        assert said_in_first_sentence(answer) == _pope_as_published(answer)


def test_exchanged_answers_are_the_other_ones_and_nothing_else_changes() -> None:
    items = [Item("1", ("a.jpg",), "q", "yes"), Item("2", ("b.jpg",), "q", "no")]
    exchanged = exchange_yes_no(items)
    assert [item.answer for item in exchanged] == ["no", "yes"]
    assert exchange_yes_no(exchanged) == items

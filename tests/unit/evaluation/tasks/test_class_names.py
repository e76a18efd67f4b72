from __future__ import annotations

import pytest

from mmicl_core.evaluation.tasks.class_names import class_named

NAMES = ("cat", "fish", "aquarium fish", "automobile", "t.v.")


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("cat", "cat"),
        ("A Cat.", "cat"),
        ("The main object is a cat, a grey cat", "cat"),
        ("aquarium fish", "aquarium fish"),
        ("fish", "fish"),
        ("t.v.", "t.v."),
        ("tavo", None),
        ("caterpillar", None),
        ("cat or fish", None),
        ("aquarium fish, not just any fish", None),
        ("dog", None),
        ("", None),
    ],
)
def test_answer_names_a_class_only_if_it_holds_one_name_as_whole_words(
    answer: str, named: str | None
) -> None:
    assert class_named(answer, NAMES) == named


def test_name_with_capital_letters_is_given_as_it_is_written() -> None:
    assert class_named("it is a DOG", ("Dog", "Cat")) == "Dog"

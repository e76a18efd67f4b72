from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.evaluation.answering import Reply
from pipelines.answers import AT_ONCE_IN_SQL, AnswerStore

REPLIES: Mapping[str, Reply] = {
    "plain": Reply("bako"),
    "long": Reply('ein "Kätzchen"\n猫', 321, {"yes": -0.125, "no": -17.5}),
    "empty": Reply("", 0),
}
# Variables of one statement in the oldest SQLite.
MOST_VARIABLES = 999


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "not yet there" / "answers.sqlite"


def test_what_was_kept_is_found_again(path: Path) -> None:
    store = AnswerStore(path)
    store.keep(REPLIES)
    assert store.known(REPLIES) == REPLIES
    assert store.known(["empty", "never asked"]) == {"empty": REPLIES["empty"]}
    assert store.known(["never asked"]) == store.known([]) == {}


def test_key_that_is_asked_for_twice_is_found(path: Path) -> None:
    store = AnswerStore(path)
    store.keep(REPLIES)
    assert store.known(["plain", "long", "plain"]) == {name: REPLIES[name] for name in ("plain", "long")}


def test_last_reply_to_a_question_counts(path: Path) -> None:
    store = AnswerStore(path)
    store.keep(REPLIES)
    store.keep({"plain": Reply("mute", 5)})
    assert store.known(REPLIES) == {**REPLIES, "plain": Reply("mute", 5)}


def test_replies_survive_the_store_that_kept_them(path: Path) -> None:
    AnswerStore(path).keep(REPLIES)
    assert AnswerStore(path).known(REPLIES) == REPLIES
    AnswerStore(path).keep({"later": Reply("dine")})
    assert len(AnswerStore(path).known([*REPLIES, "later"])) == 4


def test_store_sees_what_another_one_keeps_in_the_same_file(path: Path) -> None:
    one, other = AnswerStore(path), AnswerStore(path)
    one.keep({"plain": REPLIES["plain"]})
    other.keep({"long": REPLIES["long"]})
    assert one.known(REPLIES).keys() == other.known(REPLIES).keys() == {"plain", "long"}


def test_batch_of_which_one_reply_cannot_be_kept_leaves_none(path: Path) -> None:
    store = AnswerStore(path)
    store.keep({"empty": REPLIES["empty"]})
    # Half of a character cannot be written as UTF-8.
    broken = {"plain": REPLIES["plain"], "\ud83d": REPLIES["long"], "long": REPLIES["long"]}
    with pytest.raises(UnicodeEncodeError):
        store.keep(broken)
    assert store.known(REPLIES) == {"empty": REPLIES["empty"]}
    store.keep({"plain": REPLIES["plain"]})
    assert store.known(REPLIES).keys() == {"plain", "empty"}


@pytest.mark.parametrize("count", [AT_ONCE_IN_SQL, AT_ONCE_IN_SQL + 1, 3 * MOST_VARIABLES])
def test_more_keys_than_one_query_takes_are_kept_and_found(
    path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def limited(*arguments: Any, **more: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **more)
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, MOST_VARIABLES)
        return connection

    monkeypatch.setattr("sqlite3.connect", limited)
    store = AnswerStore(path)
    replies = {f"key {number}": Reply(str(number), number) for number in range(count)}
    store.keep(replies)
    assert store.known([*replies, *(f"no {number}" for number in range(count))]) == replies

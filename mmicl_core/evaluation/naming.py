"""2-way naming of concepts that the model has never seen, by names made up for the episode.

Conditions, on the same queries. Of the plain model:
    zero_shot          the query alone: no demonstration tells the names, so no answer can be right
    full               demonstrations with their pictures
    swapped            as `full`, with the two names exchanged; scored against the unchanged names, so a
                       model that follows its demonstrations scores low
    true_name          the query's picture alone, asked for the name that its concept has: what the model
                       knows without being shown
    kind               the same about the kind of thing that the picture shows
Of the model with an adapter, demonstrations as the adapter takes them (AIM: fused):
    adapted_zero_shot, adapted, adapted_swapped, adapted_kind
    mixed              as `adapted`, with the last demonstration written out in full (AIM)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmicl_core.config.evaluate import ADAPTED, Condition
from mmicl_core.data.tasks.caption import NAME_QUESTION
from mmicl_core.data.tasks.kind import KIND_QUESTION
from mmicl_core.methods.base import Method, Pictures

__all__ = ["NamingTask", "asked"]

QUESTIONS: Mapping[str, str] = {
    "true_name": NAME_QUESTION,
    "kind": KIND_QUESTION,
    "adapted_kind": KIND_QUESTION,
}


class NamingTask:
    """Answers queries greedily under each condition.

    Args:
        plain: the model as it is.
        adapted: the model with an adapter; without one its conditions cannot be asked for.
        max_new_tokens: an answer is cut there.
    """

    def __init__(self, plain: Method, adapted: Method | None, max_new_tokens: int) -> None:
        self._plain, self._adapted, self._max_new_tokens = plain, adapted, max_new_tokens

    def answer(
        self, episodes: Sequence[Mapping[str, Any]], condition: Condition, pictures: Pictures
    ) -> list[str]:
        """One answer for each EPISODE row; `pictures` hold every picture of the rows."""
        method = self.method(condition)
        batch = method.collate([asked(row, condition) for row in episodes], pictures, None, side="left")
        return [method.chat.decode(ids) for ids in method.answer(batch, self._max_new_tokens)]

    def method(self, condition: Condition) -> Method:
        """What answers under a condition."""
        if condition not in ADAPTED:
            return self._plain
        assert self._adapted is not None
        return self._adapted


def asked(episode: Mapping[str, Any], condition: Condition) -> dict[str, Any]:
    """An EPISODE row as a condition shows it, its query without the answer."""
    *shown, query = episode["turns"]
    query = {**query, "answer": None}
    if condition.endswith("swapped"):
        shown = [{**turn, "answer": _exchange(turn["answer"], *episode["names"])} for turn in shown]
    if condition in ("zero_shot", "adapted_zero_shot", *QUESTIONS):
        shown = []
    query["question"] = QUESTIONS.get(condition, query["question"])
    return {**episode, "turns": [*shown, query], "raw": int(condition == "mixed")}


def _exchange(answer: str, one: str, other: str) -> str:
    """An answer with the name in it exchanged; neither name lies inside the other."""
    return answer.replace(one, other) if one in answer else answer.replace(other, one)

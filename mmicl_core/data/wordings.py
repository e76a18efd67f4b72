"""How a 2-way episode is worded: what stands beside each picture, and what a name stands in.

`plain` asks one question and answers with the name alone. `released` has the fixed sentences of the released
code of link-context learning (arXiv:2308.07891): the first demonstration tells what to look for, every
demonstration stands between marks, and the query is announced. There, one of 66 phrasings asks in training
and one fixed phrasing in evaluation; the 66 here are our own, the fixed one is the first. Pictures stand
where the model's chat template puts them, so no sentence says where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PHRASINGS", "WORDINGS", "Wording"]


@dataclass(frozen=True)
class Wording:
    """Templates of an episode; `{name}` is where an answer names a class."""

    opening: str
    """Before the first demonstration's question."""
    shown_question: str
    """Beside a demonstration's picture; none takes the question that was drawn."""
    shown_answer: str
    asked_prefix: str
    """Before the query's question."""
    asked_questions: tuple[str, ...]
    """One is drawn for the query; none takes the question that was drawn for the episode."""
    asked_answer: str


PHRASINGS: tuple[str, ...] = (
    "Based on the previous examples, what is in the image?",
    "Judging by the examples above, what does this picture show?",
    "Going by what you have just seen, name the thing in this image.",
    "After these examples, what would you call what is shown here?",
    "With the examples in mind, what is this?",
    "Which of the names from the examples belongs to this image?",
    "You have seen some examples; now say what this one is.",
    "Following the examples, tell me what this image contains.",
    "Compare this image with the ones before it: what is it?",
    "What is pictured here, if the examples are your guide?",
    "Use the examples to find out what this is.",
    "How do the examples name a thing like this?",
    "From the examples you know the names; which one fits here?",
    "Look back at the examples and then name this.",
    "By the names that the examples gave, what is this?",
    "Given the pairs of images and names above, what is the name for this?",
    "Take the examples as your only source: what does the image show?",
    "If the examples are right, what is this thing called?",
    "Recall what the examples taught you and say what is here.",
    "The examples tell two things apart; which of them is this?",
    "Let the examples decide: what is in this picture?",
    "Think of the examples. What do you see now?",
    "What does this last image show, in the words of the examples?",
    "Answer as the examples do: what is in this image?",
    "In the same way as before, name what this image shows.",
    "Now it is your turn: what is in the image?",
    "Having learnt from the examples, identify what is shown.",
    "What have the examples taught you to call this?",
    "Find the example that is most like this one; what is it called?",
    "According to the examples, what object is here?",
    "Continue the series: what is in this one?",
    "Which name did the examples give to things of this sort?",
    "Say what this is, by comparing it with the examples.",
    "What is the right name for this, seeing the examples?",
    "The names were explained by example. What is this?",
    "Bear the examples in mind and name the object.",
    "What would the author of the examples call this?",
    "Decide by the examples what this picture contains.",
    "On the evidence of the examples, what is shown?",
    "Please name what you see, as it was named before.",
    "As the earlier images were named, how is this one named?",
    "What is this an image of, as far as the examples tell?",
    "Apply what you saw above to this image: what is it?",
    "What do you recognise here from the examples?",
    "Which of the things in the examples is here again?",
    "Using only what was shown, name this.",
    "The same rule holds for this image. What is in it?",
    "What appears in this image, in terms of the examples?",
    "Match this image to the examples and give its name.",
    "Can you tell from the examples what this is?",
    "What name goes with this image, as with those before?",
    "Draw on the examples to name what is visible here.",
    "Seen in the light of the examples, what is this?",
    "Whatever you knew before, the examples count: what is this?",
    "Here is one more. What is in it?",
    "Work out from the examples what this shows.",
    "What is the thing in this image called in the examples?",
    "Tell what is here, just as it was told for the examples.",
    "Which example does this resemble, and what is its name?",
    "What do the examples say that this is?",
    "Put a name to this image, taken from the examples.",
    "Knowing the examples, what can you see here?",
    "For this image too, say what is in it.",
    "What is this, then, after all those examples?",
    "Rely on the examples: what is in this image?",
    "Last question: what does the picture show?",
)

WORDINGS: Mapping[str, Wording] = {
    "plain": Wording("", "", "{name}", "", (), "{name}"),
    "released": Wording(
        opening="You should find the causal relationship between the examples I am going to show you. And "
        "use that to answer to the [FINAL QUESTION]. ",
        shown_question="[BEGIN EXAMPLE] What is in the image?",
        shown_answer='there is "{name}" in the image. [END EXAMPLE]',
        asked_prefix="[FINAL QUESTION]: ",
        asked_questions=PHRASINGS,
        asked_answer='there is "{name}" in the image.',
    ),
}

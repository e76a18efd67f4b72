from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from tokenizers import AddedToken

from mmicl_core.errors import BackboneError, DataError
from mmicl_core.prompts import IMAGE, ChatFormat, Piece, Turn, count_text, demonstration_key
from tests.fakes import tiny_backbone


class _Letters:
    """A tokenizer whose tokens are letters."""

    all_special_tokens = ("<stop>",)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


class _Processor:
    """A processor whose chat template is a function of the turns and of whether an answer is asked for."""

    tokenizer = _Letters()

    def __init__(self, template: Any) -> None:
        self.chat_template = template

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        chat_template: Any,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        assert not tokenize
        spoken = []
        for message in messages:
            parts = [part.get("text", "<image>") for part in message["content"]]
            spoken.append((message["role"], "".join(parts)))
        return str(chat_template(spoken, add_generation_prompt))


def _chat(template: Any, of_family: Any = None) -> ChatFormat:
    return ChatFormat(_Processor(template), "<image>", of_family)


def _vicuna(spoken: list[tuple[str, str]], asks: bool) -> str:
    """LLaVA-1.5: a system sentence once, then turns."""
    text = "A chat. "
    for role, said in spoken:
        text += f"USER: {said} " if role == "user" else f"ASSISTANT: {said}</s>"
    return text + ("ASSISTANT:" if asks else "")


def _text(pieces: list[Piece]) -> str:
    return "".join("<image>" if p.kind == IMAGE else "".join(map(chr, p.ids)) for p in pieces)


def test_prefix_and_turns_of_nano_join_to_what_its_template_writes() -> None:
    backbone = tiny_backbone()
    chat, processor = backbone.chat, backbone.processor
    turns = [Turn(("a",), "This is", "bako"), Turn(("b",), "This is", "mute"), Turn(("c",), "This is", None)]
    pieces = [*chat.prefix(), *(piece for turn in turns for piece in chat.turn(turn))]
    assert chat.conversation(turns) == pieces
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = [token for piece in pieces for token in (piece.ids if piece.kind == "text" else [image])]
    text = "<s><image>This is<answer>bako</s><image>This is<answer>mute</s><image>This is<answer>"
    assert ids == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [piece.reference for piece in pieces if piece.kind == IMAGE] == ["a", "b", "c"]


def test_prefix_of_a_template_with_a_system_message_stands_once() -> None:
    chat = _chat(_vicuna)
    assert _text(chat.prefix()) == "A chat. "
    assert _text(chat.turn(Turn(("a",), "What?", "A cat"))) == "USER: <image>What? ASSISTANT: A cat</s>"
    assert _text(chat.turn(Turn((), "What?", None))) == "USER: What? ASSISTANT:"


def _with_system(spoken: list[tuple[str, str]], asks: bool) -> str:
    """Qwen: a message of its own where nobody brings one."""
    given = [said for role, said in spoken if role == "system"]
    others = [one for one in spoken if one[0] != "system"]
    return f"[{given[0] if given else 'Help.'}] " + _vicuna(others, asks).removeprefix("A chat. ")


def test_system_message_takes_the_place_of_the_templates_own_at_the_head() -> None:
    chat = _chat(_with_system)
    assert _text(chat.prefix()) == "[Help.] "
    assert _text(chat.prefix("See well.")) == "[See well.] "
    assert chat.prefix("Help.") == chat.prefix()
    assert chat.example == "[Help.] USER: <image>q ASSISTANT: a</s>"


def test_system_message_is_handed_over_as_text_where_the_template_takes_no_parts() -> None:
    processor = _Processor(None)
    processor.chat_template = "given"

    def apply(messages: list[dict[str, Any]], **more: Any) -> str:
        spoken = [(one["role"], one["content"]) for one in messages]
        said = [(role, str(part) if role == "system" else _said(part)) for role, part in spoken]
        return _with_system(said, more["add_generation_prompt"])

    processor.apply_chat_template = apply
    assert _text(ChatFormat(processor, "<image>").prefix("See well.")) == "[See well.] "


def _said(parts: list[dict[str, str]]) -> str:
    return "".join(part.get("text", "<image>") for part in parts)


def _as_a_user(spoken: list[tuple[str, str]], asks: bool) -> str:
    return _vicuna([("user" if role == "system" else role, said) for role, said in spoken], asks)


def _in_the_first_turn(spoken: list[tuple[str, str]], asks: bool) -> str:
    given = [said for role, said in spoken if role == "system"]
    others = [one for one in spoken if one[0] != "system"]
    return _vicuna(others, asks).replace("USER: ", f"USER: {''.join(given)}", 1)


def _refusing(spoken: list[tuple[str, str]], asks: bool) -> str:
    if any(role == "system" for role, _ in spoken):
        raise RuntimeError("only user and assistant")
    return _vicuna(spoken, asks)


def _silent(spoken: list[tuple[str, str]], asks: bool) -> str:
    return _vicuna([one for one in spoken if one[0] != "system"], asks)


@pytest.mark.parametrize("template", [_as_a_user, _in_the_first_turn, _refusing, _silent])
def test_system_message_that_a_template_has_no_place_for_is_refused(template: Any) -> None:
    chat = _chat(template)
    with pytest.raises(DataError, match="takes no system message: write the instructions into the first"):
        chat.prefix("See well.")
    assert chat.prefix()


def test_places_of_fused_demonstrations_stand_between_the_prefix_and_the_turns() -> None:
    chat = _chat(_vicuna)
    turn = Turn(("a",), "What?", "A cat")
    prefix, first, second, *rest = chat.conversation([turn], fused=2)
    assert [prefix] == chat.prefix() and rest == chat.turn(turn)
    assert (first, second) == (Piece("fused", reference="0"), Piece("fused", reference="1"))


def test_pictures_of_one_turn_stand_in_their_order_each_at_its_place() -> None:
    chat = _chat(_vicuna)
    pieces = chat.turn(Turn(("b", "a"), "Alike?", "No"))
    assert _text(pieces) == "USER: <image><image>Alike? ASSISTANT: No</s>"
    assert [piece.reference for piece in pieces if piece.kind == IMAGE] == ["b", "a"]


def test_text_of_a_prompt_is_counted_without_its_pictures_and_places() -> None:
    chat = _chat(_vicuna)
    prompt = chat.conversation([Turn(("a", "b"), "What?", None)], fused=3)
    # A token is a letter here.
    assert count_text(prompt) == len("A chat. USER: What? ASSISTANT:")


def test_key_of_a_demonstration_tells_its_pictures_their_order_and_its_words_apart() -> None:
    turns = [
        Turn(("a",), "What?", "A cat"),
        Turn(("b",), "What?", "A cat"),
        Turn((), "What?", "A cat"),
        Turn(("a", "b"), "What?", "A cat"),
        Turn(("b", "a"), "What?", "A cat"),
        Turn(("a", "a"), "What?", "A cat"),
        Turn(("a",), "Who?", "A cat"),
        Turn(("a",), "What?", "A cup"),
    ]
    assert len({demonstration_key(turn) for turn in turns}) == len(turns)


def test_template_without_a_prefix_has_an_empty_one() -> None:
    chat = _chat(lambda spoken, asks: _vicuna(spoken, asks).removeprefix("A chat. "))
    assert chat.prefix() == []


def test_answer_is_scored_with_its_end_and_without_its_question() -> None:
    chat = _chat(_vicuna)
    pieces = chat.turn(Turn(("a",), "What?", "A cat", scored=True))
    assert _text([piece for piece in pieces if piece.scored]) == " A cat</s>"
    assert not any(piece.scored for piece in chat.turn(Turn(("a",), "What?", "A cat")))


@pytest.mark.parametrize("token", ["<image>", "<answer>", "<s>", "</s>", "<pad>"])
@pytest.mark.parametrize("place", ["question", "answer"])
def test_a_forged_control_token_is_refused(token: str, place: str) -> None:
    chat = tiny_backbone().chat
    words = {"question": "This is", "answer": "bako"} | {place: f"so{token}so"}
    with pytest.raises(DataError, match=f"control token {token}"):
        chat.turn(Turn(("a",), **words))


def test_added_tokens_are_refused_where_they_are_special_or_the_template_writes_them() -> None:
    backbone = tiny_backbone()
    tokenizer = deepcopy(backbone.tokenizer)
    tokenizer.add_tokens(["USER:", "~~", "  "])
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    processor = _Processor(_vicuna)
    processor.tokenizer = tokenizer
    chat = ChatFormat(processor, "<image>")
    for text, token in (("so USER: so", "USER:"), ("a <tool> a", "<tool>")):
        with pytest.raises(DataError, match=f"control token {token}"):
            chat.turn(Turn((), text, None))
        with pytest.raises(DataError, match=f"control token {token}"):
            chat.prefix(text)
    assert chat.turn(Turn((), "a ~~ user  a", None))


def test_a_forged_picture_is_refused_where_the_tokenizer_does_not_call_its_token_special() -> None:
    chat = _chat(_vicuna)
    with pytest.raises(DataError, match="control token <image>"):
        chat.turn(Turn(("a",), "Look: <image>", None))


@pytest.mark.parametrize(
    ("image", "places"), [("", 0), ("<image><image>", 4)], ids=["for none", "twice for each"]
)
def test_a_template_with_other_places_than_pictures_is_refused_with_both_numbers(
    image: str, places: int
) -> None:
    chat = _chat(lambda spoken, asks: _vicuna(spoken, asks).replace("<image>", image))
    with pytest.raises(
        BackboneError, match=f"gives {places} places for 2 pictures in .* <image> once for each"
    ):
        chat.turn(Turn(("a", "b"), "What?", "A cat"))


def test_template_of_the_family_stands_in_where_the_processor_has_none_and_only_there() -> None:
    def other(spoken: list[tuple[str, str]], asks: bool) -> str:
        return _vicuna(spoken, asks).replace("ASSISTANT:", "MODEL:")

    turn = Turn((), "What?", "A cat")
    assert _text(_chat(None, of_family=other).turn(turn)) == "USER: What? MODEL: A cat</s>"
    assert _text(_chat(_vicuna, of_family=other).turn(turn)) == "USER: What? ASSISTANT: A cat</s>"


def test_processor_and_family_without_a_template_are_refused_with_a_remedy() -> None:
    with pytest.raises(
        BackboneError, match="no chat template, .*: save the processor with the chat_template"
    ):
        _chat(None)


def test_a_template_that_numbers_its_turns_is_refused() -> None:
    def numbered(spoken: list[tuple[str, str]], asks: bool) -> str:
        return "".join(f"{number}. {said}\n" for number, (_, said) in enumerate(spoken))

    with pytest.raises(BackboneError, match="writes a second turn differently"):
        _chat(numbered)


def test_a_template_that_puts_all_pictures_first_is_refused() -> None:
    def gathered(spoken: list[tuple[str, str]], asks: bool) -> str:
        text = _vicuna(spoken, asks)
        return "<image>" * text.count("<image>") + text.replace("<image>", "")

    with pytest.raises(BackboneError, match="demonstrations could not be cached apart"):
        _chat(gathered)


def test_a_template_that_asks_in_other_words_than_it_answers_is_refused() -> None:
    def another(spoken: list[tuple[str, str]], asks: bool) -> str:
        return _vicuna(spoken, False) + ("MODEL:" if asks else "")

    with pytest.raises(BackboneError, match="does not begin with"):
        _chat(another).turn(Turn(("a",), "What?", "A cat"))


def test_decoding_gives_the_words_without_control_tokens() -> None:
    backbone = tiny_backbone()
    ids = backbone.tokenizer("bako</s>", add_special_tokens=False)["input_ids"]
    assert backbone.chat.decode(ids) == "bako"


def test_long_turn_loses_the_end_of_its_question_and_keeps_its_picture_and_answer() -> None:
    chat = tiny_backbone().chat
    turn = Turn(("a",), "This is surely what it is and not what it is not", "bako", scored=True)
    whole = chat.turn(turn)
    most = count_text(whole) - 5
    pieces, cut = chat.cut(turn, most)
    assert cut and most - 3 <= count_text(pieces) <= most
    assert [piece.kind for piece in pieces] == [piece.kind for piece in whole]
    assert pieces[-1] == whole[-1]
    question = whole[1].ids
    kept = len(pieces[1].ids) - 2
    assert pieces[1].ids[:kept] == question[:kept]
    assert chat.cut(turn, count_text(whole)) == (whole, False)


def test_turn_whose_answer_alone_is_too_long_is_refused_with_both_numbers() -> None:
    chat = tiny_backbone().chat
    with pytest.raises(DataError, match=r"of which \d+ are its question, and 3 are allowed"):
        chat.cut(Turn(("a",), "This is", "bako mute sidu"), 3)

"""Chat completions in front of fakes that keep the replicas' contracts."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from mmicl_core.bank import Demonstration
from mmicl_core.prompts import Turn
from mmicl_core.serving.sampling import Sampling
from pipelines.serve import chat
from pipelines.serve.contracts import PackReference, Piece, TokenLogprob
from tests.served import (
    AIM,
    BASE,
    FakeGenerator,
    ask,
    assistant,
    call,
    data_uri,
    error_of,
    events_of,
    make_services,
    png,
    user,
)

SHOTS = [user("This is", png(1)), assistant("bako"), user("This is", png(2)), assistant("mute")]
QUERY = user("This is", png(3))


@pytest.fixture
def services(tmp_path):
    return make_services(tmp_path, max_new_tokens=17)


def asked(services, messages=None, **fields):
    response = ask(services, messages, **fields)
    assert response.status_code == 200, response.text
    return services.generator.question


def pack(services, *answers) -> str:
    shots = [
        {"image_url": data_uri(png(number)), "question": "This is", "answer": answer}
        for number, answer in enumerate(answers, 10)
    ]
    made = call(services, "POST", "/v1/demo_packs", json={"demonstrations": shots})
    assert made.status_code == 200, made.text
    return made.json()["id"]


def test_completion_has_openai_fields_and_counts_what_fusing_saves(services):
    reply = ask(services, [*SHOTS, QUERY], user="somebody").json()
    message = {"role": "assistant", "content": "bako mute", "refusal": None}
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "nano@aim"
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert reply["usage"] == {
        "prompt_tokens": 36,
        "completion_tokens": 2,
        "total_tokens": 38,
        "prompt_tokens_details": {"cached_tokens": 7},
        "cached_tokens": 7,
        "demo_tokens_full": 38,
        "demo_tokens_fused": 6,
    }
    assert reply["mmicl"] == {"ttft_ms": 12.5, "queued_ms": 1.5}
    assert ask(services).json()["id"] != reply["id"]


def test_demonstrations_with_pictures_are_fused_where_the_model_can(services):
    question = asked(services, [*SHOTS, user("Why?"), assistant("Because."), QUERY])
    (call_,) = services.compressor.asked
    shots = (Demonstration((png(1),), "This is", "bako"), Demonstration((png(2),), "This is", "mute"))
    assert call_ == ("fuse", "nano@aim", "public", shots)
    assert question.turns == (Turn((), "Why?", "Because."), Turn(("6.1",), "This is", None))
    assert question.pictures == {"6.1": png(3)}
    assert [len(one) for one in question.fusion.fused] == [3, 3]


@pytest.mark.parametrize("fields", [{"demonstrations": "full"}, {"model": BASE.id}])
def test_demonstrations_are_written_out_where_asked_or_where_the_model_cannot_fuse(services, fields):
    question = asked(services, [*SHOTS, QUERY], **fields)
    assert services.compressor.asked == []
    assert question.fusion is None
    assert [turn.answer for turn in question.turns] == ["bako", "mute", None]
    assert question.pictures == {"0.1": png(1), "2.1": png(2), "4.1": png(3)}


def test_demonstrations_fused_takes_all_earlier_turns(services):
    question = asked(services, [user("Why?"), assistant("Because."), *SHOTS, QUERY], demonstrations="fused")
    assert question.turns == (Turn(("6.1",), "This is", None),)
    assert services.compressor.asked[0][3][0] == Demonstration((), "Why?", "Because.")


def test_request_overrides_what_the_settings_say_of_demonstrations(tmp_path):
    services = make_services(tmp_path, demonstrations="full")
    assert asked(services, [*SHOTS, QUERY]).fusion is None
    assert asked(services, [*SHOTS, QUERY], demonstrations="auto").fusion is not None


def test_model_that_cannot_fuse_refuses_to_and_names_the_one_that_can(services):
    error = error_of(ask(services, [*SHOTS, QUERY], model=BASE.id, demonstrations="fused"), 400)
    assert error["param"] == "model"
    assert "'nano@aim' does" in error["message"]
    asked(services, [QUERY], model=BASE.id, demonstrations="fused")


def test_pack_is_named_to_the_generator_and_its_tokens_are_not_read_here(services):
    name = pack(services, "bako", "mute")
    question = asked(services, [QUERY], demo_pack=name)
    entry = services.bank.describe("public", name)
    assert question.fusion.fused == PackReference("public", name)
    assert (question.fusion.name, question.fusion.known) == (entry.digest, 2)
    assert (question.fusion.tokens_full, question.fusion.tokens_fused) == ((19, 19), (3, 3))
    assert [call_[0] for call_ in services.compressor.asked] == ["register"]


def test_pack_with_select_is_chosen_from_by_the_pictures_of_the_last_message(services):
    name = pack(services, "bako", "mute", "lofa")
    question = asked(services, [QUERY], demo_pack={"id": name, "select": 2})
    assert services.compressor.asked[-1] == (
        "select",
        "nano@aim",
        PackReference("public", name),
        (png(3),),
        2,
    )
    assert len(question.fusion.tokens_fused) == 2


@pytest.mark.parametrize(
    ("messages", "use", "reason"),
    [
        ([user("This is")], {"select": 1}, "send one, or leave select out"),
        ([QUERY], {"select": 3}, "holds 2 demonstrations"),
    ],
)
def test_selection_that_cannot_be_made_is_refused(services, messages, use, reason):
    error = error_of(ask(services, messages, demo_pack={"id": pack(services, "bako", "mute")} | use), 400)
    assert error["param"] == "demo_pack.select"
    assert reason in error["message"]


def test_turns_beside_a_pack_are_written_out_and_never_fused(services):
    name = pack(services, "bako")
    question = asked(services, [*SHOTS, QUERY], demo_pack=name)
    assert len(question.turns) == 3
    assert question.fusion.fused == PackReference("public", name)
    error = error_of(ask(services, [*SHOTS, QUERY], demo_pack=name, demonstrations="fused"), 400)
    assert error["param"] == "demonstrations"


def test_pack_of_another_model_is_refused_with_the_name_of_the_one_that_made_it(services):
    name = pack(services, "bako")
    error = error_of(ask(services, [QUERY], model=BASE.id, demo_pack=name), 400)
    assert (error["param"], "'nano@aim'" in error["message"]) == ("model", True)
    other = replace(AIM, id="nano@other", maker={**AIM.maker, "adapter": "c" * 64})
    services.generator.served = (BASE, AIM, other)
    response = ask(services, [QUERY], model=other.id, demo_pack=name)
    assert "name 'nano@aim' as the model" in error_of(response, 409)["message"]
    assert response.headers["x-should-retry"] == "false"
    services.generator.served = (BASE, replace(other, id=AIM.id))
    error = error_of(ask(services, [QUERY], demo_pack=name), 409)
    assert error["code"] == "demo_pack_unusable"
    assert "register its demonstrations again" in error["message"]


def test_pack_that_is_not_there_is_not_found(services):
    assert (
        error_of(ask(services, [QUERY], demo_pack="pack-" + "0" * 32), 404)["code"] == "demo_pack_not_found"
    )
    assert error_of(ask(services, [QUERY], demo_pack="../../etc"), 404)["code"] == "demo_pack_not_found"


def test_prefix_names_all_that_stands_before_the_last_turn(services):
    written = {"demonstrations": "full"}
    system = {"role": "system", "content": "Be brief."}
    names = [
        asked(services, [*SHOTS, QUERY], **written).prefix,
        asked(services, [*SHOTS[:2], QUERY], **written).prefix,
        asked(services, [system, *SHOTS, QUERY], **written).prefix,
        asked(services, [system, QUERY]).prefix,
    ]
    assert len(set(names)) == 4 and None not in names
    assert asked(services, [*SHOTS, user("Another")], **written).prefix == names[0]
    assert asked(services, [QUERY]).prefix is None
    assert asked(services, [system, QUERY]).system == "Be brief."


def test_sampling_is_as_the_request_says(services):
    fields = {"temperature": 0.7, "top_p": 0.9, "n": 2, "stop": "\n", "seed": 5, "max_tokens": 3}
    question = asked(services, logprobs=True, top_logprobs=4, ignore_eos=True, **fields)
    assert question.samplings == tuple(Sampling(3, 0.7, 0.9, seed, ("\n",), 4, True) for seed in (5, 6))


def test_sampling_without_a_word_takes_the_likeliest_token_and_a_seed_of_its_own(services):
    first, second = (asked(services).samplings[0] for _ in range(2))
    assert replace(first, seed=0) == Sampling(17)
    assert first.seed != second.seed


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_seed_of_64_bits_is_taken(services, seed):
    samplings = asked(services, seed=seed, n=2).samplings
    assert all(0 <= one.seed < 2**63 for one in samplings)
    assert asked(services, seed=seed, n=2).samplings == samplings


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_limit_of_the_request_replaces_the_default(services, field):
    assert asked(services, **{field: 5}).samplings[0].max_new_tokens == 5


def test_several_answers_come_as_choices_with_their_own_logprobs(services):
    reply = ask(services, n=2, logprobs=True, top_logprobs=1).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert reply["usage"]["completion_tokens"] == 4
    first, second = (choice["logprobs"]["content"] for choice in reply["choices"])
    told = {"token": "bako", "logprob": -0.5, "bytes": list(b"bako")}
    assert first == second
    assert first[0] == told | {"top_logprobs": [told]}
    assert "".join(token["token"] for token in first) == "bako mute"


class Impossible(FakeGenerator):
    """Tells a half character, and something that never happens."""

    def _piece(self, question, index, text):
        half = TokenLogprob("\ufffd", -0.25, (("x", float("-inf")),))
        return Piece(index, text, (half,) if question.samplings[index].top_logprobs is not None else ())


@pytest.mark.parametrize("stream", [True, False])
def test_likelihoods_that_json_cannot_say_are_told_as_openai_tells_them(tmp_path, stream):
    services = make_services(tmp_path, generator=Impossible())
    response = ask(services, logprobs=True, top_logprobs=1, stream=stream)
    choice = events_of(response)[1]["choices"][0] if stream else response.json()["choices"][0]
    token = choice["logprobs"]["content"][0]
    assert (token["bytes"], token["top_logprobs"][0]["logprob"]) == (None, -9999.0)


def test_answer_can_be_sent_back_as_it_came(services):
    message = ask(services, [QUERY]).json()["choices"][0]["message"]
    assert asked(services, [QUERY, message, user("Why?")], model=BASE.id).turns[0].answer == "bako mute"


def test_pictures_at_addresses_are_loaded_through_the_guard(services):
    class Media:
        async def load(self, url, where):
            return png(9)

    guarded = replace(services, media=Media())
    question = asked(guarded, [user("This is", "https://pictures.example/cat.png")])
    assert question.pictures == {"0.1": png(9)}
    refused = error_of(ask(services, [user("This is", "https://pictures.example/cat.png")]), 400)
    assert refused["param"] == "messages.0.content.1.image_url.url"


def test_metrics_count_tokens_and_what_the_bank_had(services):
    name = pack(services, "bako", "mute")
    ask(services, [QUERY], demo_pack=name)
    ask(services, [*SHOTS, QUERY], stream=True)
    page = call(services, "GET", "/metrics").text
    assert 'mmicl_bank_demonstrations_total{result="hit"} 2.0' in page
    assert 'mmicl_bank_demonstrations_total{result="miss"} 2.0' in page
    assert 'mmicl_tokens_total{kind="completion",model="nano@aim"} 4.0' in page


def test_taking_a_large_request_apart_leaves_the_event_loop_free(services, monkeypatch):
    threads = []
    read = chat.read_conversation

    def note(*arguments):
        threads.append(threading.current_thread())
        return read(*arguments)

    monkeypatch.setattr(chat, "read_conversation", note)
    asked(services, [user("This is" * 10_000)])
    assert threads != [] and threading.main_thread() not in threads


def test_models_are_listed_and_described_with_what_is_our_own(services):
    listed = call(services, "GET", "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["nano", "nano@aim"]
    described = call(services, "GET", "/v1/models/nano@aim").json()
    # Each of the two calls has an application of its own, which began when it began.
    assert described == listed["data"][1] | {"created": described["created"]}
    assert (described["object"], described["method"], described["fuses"]) == ("model", "aim", True)
    assert described["context_length"] == 4096
    error = error_of(call(services, "GET", "/v1/models/org/other"), 404)
    assert (error["code"], "'org/other'" in error["message"]) == ("model_not_found", True)

"""The stock `openai` client in front of the API, over a socket: it takes and raises what it promises."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from mmicl_core.errors import BankError, DataError
from pipelines.serve.contracts import ServedModel
from pipelines.serve.errors import DeadlineError, OverloadedError, UnavailableError
from pipelines.serve.keys import add_key
from pipelines.serve.openai_api import build_api
from tests.served import AIM, BASE, FakeGenerator, assistant, data_uri, make_services, png, served, user

ASKED = {"model": AIM.id, "messages": [user("This is", png(1)), assistant("bako"), user("This is", png(2))]}


@pytest.fixture
def services(tmp_path):
    return make_services(tmp_path)


@contextmanager
def client_of(services, kind=OpenAI, **options):
    with served(build_api(services)) as url:
        yield kind(base_url=f"{url}/v1", **({"api_key": "none", "max_retries": 0} | options))


def talk(services, conversation, **options):
    """Run a coroutine function with an asynchronous client."""
    with client_of(services, AsyncOpenAI, **options) as client:

        async def run():
            async with client:
                return await conversation(client)

        return asyncio.run(run())


def test_completion_is_typed_and_keeps_what_is_our_own(services):
    with client_of(services) as client, client:
        found = client.chat.completions.create(**ASKED)
    assert found.choices[0].message.content == "bako mute"
    assert found.choices[0].finish_reason == "stop"
    assert (found.usage.prompt_tokens, found.usage.prompt_tokens_details.cached_tokens) == (33, 7)
    assert (found.usage.demo_tokens_full, found.usage.demo_tokens_fused) == (19, 3)
    assert found.mmicl["ttft_ms"] == 12.5
    assert len(found._request_id) == 32


def test_all_options_of_sampling_pass(services):
    options = {"temperature": 0.5, "top_p": 0.9, "stop": ["."], "seed": 7, "n": 2, "max_completion_tokens": 5}
    with client_of(services) as client, client:
        found = client.chat.completions.create(**ASKED, **options, logprobs=True, top_logprobs=2, user="me")
    assert [choice.index for choice in found.choices] == [0, 1]
    first = found.choices[1].logprobs.content[0]
    assert (first.token, first.logprob, bytes(first.bytes)) == ("bako", -0.5, b"bako")
    assert [one.token for one in first.top_logprobs] == ["bako", "bako1"]
    assert services.generator.question.samplings[1].seed == 8


def test_our_own_options_pass_in_the_extra_body(services):
    with client_of(services) as client, client:
        shot = {"image_url": data_uri(png()), "question": "This is", "answer": "bako"}
        pack = client.post("/demo_packs", body={"demonstrations": [shot]}, cast_to=object)
        extra = {"demo_pack": {"id": pack["id"], "select": 1}, "timeout_seconds": 5}
        client.chat.completions.create(model=AIM.id, messages=[user("a", png())], extra_body=extra)
        assert services.generator.question.fusion is not None
        client.chat.completions.create(**ASKED, extra_body={"demonstrations": "full"})
        assert len(services.generator.question.turns) == 2


def test_stream_is_read_chunk_by_chunk_with_usage_at_its_end(services):
    with client_of(services) as client, client:
        options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
        chunks = list(client.chat.completions.create(**ASKED, **options))
    assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == "bako mute"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[1].choices[0].logprobs.content[0].token == "bako"
    assert (chunks[-1].choices, chunks[-1].usage.demo_tokens_fused, chunks[-1].usage.total_tokens) == (
        [],
        3,
        35,
    )


def test_helper_for_streams_puts_the_same_completion_together(services):
    with client_of(services) as client, client, client.chat.completions.stream(**ASKED, n=2) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert [choice.message.content for choice in found.choices] == ["bako mute"] * 2


def test_asynchronous_client_asks_many_things_at_once(services):
    async def conversation(client):
        whole = [client.chat.completions.create(**ASKED) for _ in range(8)]
        stream = await client.chat.completions.create(**ASKED, stream=True)
        grown = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return await asyncio.gather(*whole), grown

    found, grown = talk(services, conversation)
    assert {one.choices[0].message.content for one in found} == {"bako mute"} == {"".join(grown)}
    assert len({one.id for one in found}) == 8


def test_stream_that_is_closed_early_ends_the_work(tmp_path):
    services = make_services(tmp_path, generator=FakeGenerator(pieces=["a"] * 1000, seconds=0.02))

    async def conversation(client):
        async with await client.chat.completions.create(**ASKED, stream=True) as stream:
            async for _ in stream:
                break
        for _ in range(500):
            if services.generator.cancelled:
                break
            await asyncio.sleep(0.01)

    talk(services, conversation)
    assert services.generator.cancelled == 1


@pytest.mark.parametrize("kind", [OpenAI, AsyncOpenAI])
@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"n": 99}, openai.BadRequestError, "invalid_value", "n"),
        ({"tools": []}, openai.BadRequestError, "invalid_value", "tools"),
        (
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "invalid_value",
            "response_format",
        ),
        ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found", "model"),
        ({"extra_body": {"demo_pack": "x"}}, openai.NotFoundError, "demo_pack_not_found", None),
    ],
)
def test_mistakes_are_raised_with_code_and_field_and_are_not_retried(
    services, kind, fields, error, code, param
):
    async def conversation(client):
        await client.chat.completions.create(**ASKED | fields)

    with pytest.raises(error) as raised:
        if kind is AsyncOpenAI:
            talk(services, conversation, max_retries=3)
        else:
            with client_of(services, max_retries=3) as client, client:
                client.chat.completions.create(**ASKED | fields)
    assert (raised.value.code, raised.value.param, raised.value.type) == (
        code,
        param,
        "invalid_request_error",
    )
    assert len(raised.value.request_id) == 32
    assert services.generator.questions == []


def test_pack_that_cannot_be_used_is_not_asked_for_again(tmp_path):
    services = make_services(tmp_path, generator=FakeGenerator(errors=[BankError("damaged")] * 4))
    with client_of(services, max_retries=3) as client, client, pytest.raises(openai.ConflictError):
        client.chat.completions.create(**ASKED)
    assert len(services.generator.questions) == 1


def test_key_that_is_not_known_is_raised_and_a_known_one_passes(tmp_path):
    keys = tmp_path / "keys"
    key = add_key(keys, "me")
    services = make_services(tmp_path, keys=str(keys))
    with client_of(services, api_key=key) as client, client:
        assert client.chat.completions.create(**ASKED).choices
    with client_of(services, api_key="wrong") as client, client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_rate_limit_is_raised_with_the_time_to_wait(tmp_path):
    services = make_services(tmp_path, requests_per_minute=2)
    with client_of(services) as client, client:
        client.models.list()
        client.models.list()
        with pytest.raises(openai.RateLimitError) as raised:
            client.models.list()
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 30
    assert raised.value.code == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OverloadedError("too many wait", 0.1), openai.RateLimitError),
        (UnavailableError("no replica"), openai.InternalServerError),
        (RuntimeError("a mistake"), openai.InternalServerError),
    ],
)
def test_failure_that_may_pass_away_is_retried_until_it_has(tmp_path, error, raised):
    services = make_services(tmp_path, generator=FakeGenerator(errors=[error]))
    with client_of(services, max_retries=2) as client, client:
        assert client.chat.completions.create(**ASKED, stream=False).choices
    assert len(services.generator.questions) == 2
    services.generator._errors = [error]
    with client_of(services) as client, client, pytest.raises(raised):
        client.chat.completions.create(**ASKED, stream=True)


def test_asynchronous_client_retries_the_beginning_of_a_stream(tmp_path):
    services = make_services(
        tmp_path, generator=FakeGenerator(errors=[OverloadedError("too many wait", 0.1)])
    )

    async def conversation(client):
        stream = await client.chat.completions.create(**ASKED, stream=True)
        return [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(talk(services, conversation, max_retries=1)) == "bako mute"


@pytest.mark.parametrize(
    "error", [DataError("broken in the middle"), DeadlineError("too late"), RuntimeError("x")]
)
def test_failure_within_a_stream_is_raised_where_it_is_read(tmp_path, error):
    services = make_services(tmp_path, generator=FakeGenerator(break_off=error))
    read = []
    with client_of(services) as client, client, pytest.raises(openai.APIError) as raised:
        for chunk in client.chat.completions.create(**ASKED, stream=True):
            read.append(chunk.choices[0].delta.content)
    assert read == ["", "bako", " mute"]
    assert (raised.value.message == str(error)) == (not isinstance(error, RuntimeError))


def test_client_that_loses_patience_ends_the_work(tmp_path):
    services = make_services(tmp_path, generator=FakeGenerator(begin=60))
    with client_of(services, timeout=0.2) as client:
        with client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**ASKED)
        with OpenAI(base_url=client.base_url, api_key="none") as other:
            other.models.list()
    assert services.generator.cancelled == 1


def test_models_are_listed_and_retrieved_by_names_with_an_adapter(services):
    with client_of(services) as client, client:
        assert [model.id for model in client.models.list()] == ["nano", "nano@aim"]
        found = client.models.retrieve("nano@aim")
        assert (found.id, found.method, found.fuses) == ("nano@aim", "aim", True)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nano@other")


def test_models_follow_what_the_generator_serves(services):
    async def conversation(client):
        before = [model.id async for model in client.models.list()]
        services.generator.served = (BASE, AIM, ServedModel("nano@m2pt", "m2pt", False, {}, 4096))
        after = [model.id async for model in client.models.list()]
        return before, after

    before, after = talk(services, conversation)
    assert after == [*before, "nano@m2pt"]


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_embeddings_come_as_numbers_whatever_is_asked_for(services, options):
    with client_of(services) as client, client:
        found = client.embeddings.create(model="nano", input=[data_uri(png(1)), data_uri(png(2))], **options)
    vectors = [one.embedding for one in found.data]
    if options.get("encoding_format") == "base64":
        assert all(isinstance(vector, str) for vector in vectors)
    else:
        assert [np.linalg.norm(vector) for vector in vectors] == pytest.approx([1, 1])
    assert found.usage.total_tokens == 32


def test_texts_are_not_embedded(services):
    async def conversation(client):
        await client.embeddings.create(model="nano", input="a text")

    with pytest.raises(openai.BadRequestError, match="only pictures can"):
        talk(services, conversation)

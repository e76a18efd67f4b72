"""The server on a Ray of its own, asked by the stock `openai` client."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from ray import serve

from mmicl_core.config.model import AimConfig
from mmicl_core.config.serve import ReplicasConfig
from mmicl_core.errors import CheckpointError, ConfigError
from mmicl_core.methods.aim import Aim
from pipelines.serve import app
from tests.fakes import tiny_backbone
from tests.serving import (
    BASE,
    FUSES,
    VISUAL_TOKENS,
    address_of,
    answers,
    asked,
    demonstrations,
    free_port,
    replicas_of,
    tiny_run,
    told,
    write_aim,
)

LONG = 1500


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("served"))


@pytest.fixture
def client(ray_cluster, run):
    url = address_of(run)
    if not answers(url):
        assert app.start(run) == url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def _ray_outlives_the_server(ray_cluster, monkeypatch):
    # Ray outlives each of these servers, so that they must leave nothing on it.
    monkeypatch.setenv("RAY_ADDRESS", "auto")


@pytest.fixture(scope="module", autouse=True)
def _stopped_at_the_end(ray_cluster):
    yield
    app.stop()


def register(client, *seeds, model=FUSES) -> dict:
    body = {"model": model, "demonstrations": demonstrations(*(seeds or range(4)))}
    return client.post("/demo_packs", cast_to=dict, body=body)


def chat(client, *messages, model=FUSES, **more):
    return client.chat.completions.create(model=model, messages=[*messages, asked()], **more)


def test_pack_costs_in_the_prompt_what_usage_says_and_full_turns_the_rest(client):
    pack = register(client)
    alone = chat(client)
    full = chat(client, *told(*range(4)), extra_body={"demonstrations": "full"})
    fused = chat(client, *told(*range(4)))
    packed = chat(client, extra_body={"demo_pack": pack["id"]})
    assert full.usage.prompt_tokens - alone.usage.prompt_tokens == pack["tokens_full"]
    assert packed.usage.prompt_tokens - alone.usage.prompt_tokens == pack["tokens_fused"]
    for usage in (packed.usage, fused.usage):
        assert usage.demo_tokens_full == pack["tokens_full"]
        assert usage.demo_tokens_fused == pack["tokens_fused"]
    assert pack["tokens_full"] - pack["tokens_fused"] == 4 * VISUAL_TOKENS
    assert fused.choices == packed.choices
    assert packed.usage.total_tokens == packed.usage.prompt_tokens + packed.usage.completion_tokens
    assert packed.choices[0].message.role == "assistant"
    assert packed.mmicl["ttft_ms"] > 0


def test_pack_that_was_asked_with_before_is_not_read_again(client):
    pack = register(client, 20, 21, 22, 23)
    first, second = (chat(client, extra_body={"demo_pack": pack["id"]}) for _ in range(2))
    assert second.usage.cached_tokens >= pack["tokens_fused"] > first.usage.cached_tokens == 0
    assert first.choices == second.choices


def test_demonstrations_of_a_pack_are_chosen_by_the_picture_asked_about(client):
    pack = register(client, 30, 31, 32, 33)
    chosen = chat(client, extra_body={"demo_pack": {"id": pack["id"], "select": 1}})
    assert 0 < chosen.usage.demo_tokens_fused < pack["tokens_fused"]


def test_answer_can_be_sent_back_as_the_turn_before_the_next_question(client):
    first = chat(client, model=BASE)
    second = chat(client, asked(), first.choices[0].message, model=BASE)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + VISUAL_TOKENS


def test_all_pictures_of_a_message_are_read_in_their_order(client):
    def answer(*messages):
        return client.chat.completions.create(model=BASE, messages=messages)

    # Pictures of which the untrained model says different things.
    one, both, exchanged = answer(asked(3)), answer(asked(3, 4)), answer(asked(4, 3))
    assert both.usage.prompt_tokens == exchanged.usage.prompt_tokens
    assert both.usage.prompt_tokens == one.usage.prompt_tokens + VISUAL_TOKENS
    said = [reply.choices[0].message.content for reply in (one, both, exchanged)]
    assert len(set(said)) == 3
    # Two pictures of the turn before count as well.
    again = answer(asked(3, 4), both.choices[0].message, asked(3, 4))
    assert again.usage.prompt_tokens > 2 * both.usage.prompt_tokens - 2


def test_streamed_answer_is_the_answer_in_pieces(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, pieces)) == whole.choices[0].message.content
    assert len(list(filter(None, pieces))) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_pictures_become_vectors_of_length_one(client):
    picture = asked(5)["content"][1]
    found = client.embeddings.create(model=BASE, input=[picture, picture])
    first, second = (item.embedding for item in found.data)
    assert first == second
    assert sum(number * number for number in first) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("request_fields", "kind", "reason"),
    [
        ({"messages": [asked(side=101)]}, openai.BadRequestError, "101 x 101 pixels"),
        ({"messages": [asked(text="<image>")]}, openai.BadRequestError, "<image>"),
        ({"messages": [asked()], "max_tokens": 2048}, openai.BadRequestError, "the model reads 2048"),
        ({"messages": [asked()], "model": "other"}, openai.NotFoundError, "'tiny'"),
        ({"messages": [asked()], "extra_body": {"demo_pack": "none"}}, openai.NotFoundError, "pack"),
        (
            {"messages": [asked()], "extra_body": {"timeout_seconds": 0.001}},
            openai.APIStatusError,
            "0.001 seconds",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_request_that_cannot_be_served_raises_what_the_client_expects(
    client, request_fields, kind, reason, stream
):
    with pytest.raises(kind, match=reason):
        client.chat.completions.create(**{"model": FUSES, "stream": stream} | request_fields)


def test_models_and_packs_that_do_not_exist_are_not_found(client):
    assert [model.id for model in client.models.list()] == [BASE, FUSES]
    assert client.models.retrieve(FUSES).owned_by == "mmicl"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client.get("/demo_packs/none", cast_to=dict)


def test_compressor_and_generator_run_as_deployments_with_their_own_replicas(client, run):
    page = httpx.get(f"{address_of(run)}/metrics").text
    for deployment in (app.INGRESS, app.COMPRESSOR, app.GENERATOR):
        assert f'deployment="{deployment}"}} 1' in page
        assert len(replicas_of(deployment)) == 1
    assert httpx.get(f"{address_of(run)}/readyz").is_success


def test_id_of_a_request_stands_on_its_answer_once_and_one_is_made_where_none_came(client, run):
    url = f"{address_of(run)}/v1/models"
    given = httpx.get(url, headers={"x-request-id": "mine-7"}).headers.get_list("x-request-id")
    made = httpx.get(url).headers.get_list("x-request-id")
    assert given == ["mine-7"]
    assert len(made) == 1 and made[0]


def test_client_that_hangs_up_frees_the_generator(client, run):
    with chat(client, max_tokens=LONG, temperature=1.0, seed=3, stream=True) as stream:
        next(iter(stream))
        assert growing(client, run) == 2
    deadline = time.monotonic() + 5
    while growing(client, run) > 1:
        assert time.monotonic() < deadline, "the answer grows on, although nobody reads it"
        time.sleep(0.05)


def growing(client, run) -> int:
    """Answers that grow in the generator, with that of a question which finds it out."""

    def grown() -> float:
        page = httpx.get(f"{address_of(run)}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in page if "batch_size_sum{" in line)

    before = grown()
    chat(client, model=BASE, max_tokens=1)
    return round(grown() - before)


def test_adapter_is_exchanged_while_answers_are_asked_for_and_none_is_lost(client, run, tmp_path):
    write_aim(Path(run.backbone.path).parent, tmp_path / "aim", layer_norm=False)
    changed = {"aim": str(tmp_path / "aim"), "more": run.serve.adapters["aim"]}
    pack, before = register(client), [process.pid for process in replicas_of(app.GENERATOR)]
    ended = threading.Event()

    def load(_):
        texts = []
        while not ended.is_set():
            texts.append(chat(client, model=BASE).choices[0].message.content)
        return texts

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(load, number) for number in range(4)]
        try:
            app.reload(run.model_copy(update={"serve": run.serve.model_copy(update={"adapters": changed})}))
            assert [model.id for model in client.models.list()] == [BASE, FUSES, "tiny@more"]
        finally:
            ended.set()
        texts = [text for asked in asking for text in asked.result()]
    assert len(texts) > 4 and len(set(texts)) == 1
    assert [process.pid for process in replicas_of(app.GENERATOR)] == before
    # The pack is of the adapter that has another name now.
    with pytest.raises(openai.ConflictError, match="tiny@more"):
        chat(client, extra_body={"demo_pack": pack["id"]})
    assert chat(client, model="tiny@more", extra_body={"demo_pack": pack["id"]}).usage.demo_tokens_fused > 0
    app.reload(run)
    assert [model.id for model in client.models.list()] == [BASE, FUSES]


def test_adapter_that_cannot_be_loaded_is_refused_and_the_others_are_served_on(client, run, tmp_path):
    Aim(tiny_backbone(seed=1), AimConfig()).save(tmp_path / "foreign", {})
    changed = run.serve.model_copy(update={"adapters": {"aim": str(tmp_path / "foreign")}})
    before = [process.pid for process in replicas_of(app.GENERATOR)]
    with pytest.raises(CheckpointError, match="is for backbone 'tiny-1', here it is "):
        app.reload(run.model_copy(update={"serve": changed}))
    assert chat(client).usage.completion_tokens > 0
    assert [process.pid for process in replicas_of(app.GENERATOR)] == before


def test_second_server_on_the_same_port_is_refused_and_the_first_goes_on(client, run):
    with pytest.raises(ConfigError, match=rf"serve.port {run.serve.port} cannot be listened on"):
        app.start(run)
    assert chat(client).usage.completion_tokens > 0


def test_pack_registered_again_before_and_after_a_restart_is_the_same_file(client, run):
    pack = register(client, 0, 1, 2)
    (file,) = Path(run.serve.bank).rglob(f"{pack['id']}.*")
    written = file.stat().st_mtime_ns
    assert register(client, 0, 1, 2) == pack
    before = chat(client, extra_body={"demo_pack": pack["id"]})
    app.stop()
    assert not answers(address_of(run))
    app.start(run)
    assert client.get(f"/demo_packs/{pack['id']}", cast_to=dict) == pack
    after = chat(client, extra_body={"demo_pack": pack["id"]})
    assert after.choices == before.choices
    assert register(client, 0, 1, 2) == pack
    assert file.stat().st_mtime_ns == written


def test_answer_that_is_under_way_when_the_server_stops_is_finished(client, run):
    stream = chat(client, max_tokens=300, temperature=1.0, seed=3, stream=True)
    first = next(iter(stream))
    stopping = threading.Thread(target=app.stop)
    stopping.start()
    chunks = [first, *stream]
    stopping.join()
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert not answers(address_of(run))


def test_request_that_finds_the_queue_full_is_refused_with_the_time_to_come_again(ray_cluster, run):
    app.stop()
    narrow = ReplicasConfig(at_once=1, requests_each=1, queued=1)
    busy = run.model_copy(update={"serve": run.serve.model_copy(update={"generator": narrow})})
    url = app.start(busy)
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            outcomes = all_at_once(client, 8)
        refused = [error for error in outcomes if isinstance(error, openai.RateLimitError)]
        answered = [reply for reply in outcomes if not isinstance(reply, Exception)]
        assert len(refused) + len(answered) == 8 and refused and answered
        assert all(float(error.response.headers["retry-after"]) > 0 for error in refused)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=10) as client:
            assert all(not isinstance(reply, Exception) for reply in all_at_once(client, 8))
    finally:
        app.stop()


def all_at_once(client, count):
    def ask(number):
        try:
            return chat(client, model=BASE, max_tokens=200, temperature=1.0, seed=number)
        except openai.APIStatusError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


def test_server_whose_adapter_fits_another_model_does_not_start_and_leaves_nothing(
    ray_cluster, run, tmp_path
):
    app.stop()
    Aim(tiny_backbone(), AimConfig()).save(tmp_path / "foreign", {})
    changes = {"adapters": {"aim": str(tmp_path / "foreign")}, "port": free_port()}
    with pytest.raises(ConfigError, match="is for backbone 'tiny-0', here it is "):
        app.start(run.model_copy(update={"serve": run.serve.model_copy(update=changes)}))
    assert not serve.status().applications


def test_stopping_what_does_not_run_is_no_error(ray_cluster):
    app.stop()
    app.stop()
    assert not serve.status().applications

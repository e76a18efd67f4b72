"""The server on a Ray of its own, asked by the stock `openai` client."""

from __future__ import annotations

import base64
import socket
from pathlib import Path

import httpx
import openai
import pytest
from ray import serve

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.model import AimConfig, BackboneConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods.aim import Aim
from pipelines.serve import app
from tests.fakes import draw_picture, encode_picture, tiny_backbone


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny_backbone().save(folder / "backbone")
    Aim(load_backbone(folder / "backbone"), AimConfig()).save(folder / "adapter", {})
    return RunConfig(
        backbone=BackboneConfig(path=str(folder / "backbone")),
        serve=ServeConfig(
            port=free_port(),
            model_name="tiny",
            adapter=str(folder / "adapter"),
            bank=str(folder / "bank"),
            max_new_tokens=6,
            max_image_pixels=10_000,
        ),
    )


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def address_of(run) -> str:
    return f"http://127.0.0.1:{run.serve.port}"


def answers(url) -> bool:
    try:
        return httpx.get(f"{url}/healthz").is_success
    except httpx.TransportError:
        return False


def data_uri(seed, side=72) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_picture(draw_picture(seed, side))).decode()


def asked(*seeds, side=72, text="This is"):
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(seed, side)}} for seed in seeds or (99,)]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def register(client, count=4) -> dict:
    demonstrations = [
        {"image_url": {"url": data_uri(seed)}, "question": "This is", "answer": "bako mute"[seed % 2 :]}
        for seed in range(count)
    ]
    return client.post("/demo_packs", cast_to=dict, body={"demonstrations": demonstrations})


def chat(client, *messages, **more):
    return client.chat.completions.create(model="tiny", messages=[*messages, asked()], **more)


def test_pack_costs_in_the_prompt_what_usage_says_and_full_turns_the_rest(client):
    pack = register(client)
    told = [
        message
        for seed in range(4)
        for message in (asked(seed), {"role": "assistant", "content": "bako mute"[seed % 2 :]})
    ]
    alone, full = chat(client), chat(client, *told)
    packed = chat(client, extra_body={"demo_pack": pack["id"]})
    assert full.usage.prompt_tokens - alone.usage.prompt_tokens == pack["tokens_full"]
    assert packed.usage.prompt_tokens - alone.usage.prompt_tokens == pack["tokens_fused"]
    assert (packed.usage.demo_tokens_full, packed.usage.demo_tokens_fused) == (
        pack["tokens_full"],
        pack["tokens_fused"],
    )
    assert pack["tokens_full"] - pack["tokens_fused"] == 4 * 25
    assert packed.usage.total_tokens == packed.usage.prompt_tokens + packed.usage.completion_tokens
    assert packed.choices[0].message.role == "assistant"
    assert packed.mmicl["ttft_ms"] > 0


def test_answer_can_be_sent_back_as_the_turn_before_the_next_question(client):
    first = chat(client)
    second = chat(client, asked(), first.choices[0].message)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 25


def test_all_pictures_of_a_message_are_read_in_their_order(client):
    def answer(*messages):
        return client.chat.completions.create(model="tiny", messages=messages)

    # Pictures of which the untrained model says different things.
    one, both, exchanged = answer(asked(3)), answer(asked(3, 4)), answer(asked(4, 3))
    assert both.usage.prompt_tokens == exchanged.usage.prompt_tokens == one.usage.prompt_tokens + 25
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
    assert chunks[-1].usage == whole.usage


def test_pack_registered_again_before_and_after_a_restart_is_the_same_file(client, run):
    pack = register(client, count=3)
    (file,) = Path(run.serve.bank).glob(f"{pack['id']}.*")
    written = file.stat().st_mtime_ns
    assert register(client, count=3) == pack
    before = chat(client, extra_body={"demo_pack": pack["id"]})
    app.stop()
    assert not answers(address_of(run))
    app.start(run)
    assert client.get(f"/demo_packs/{pack['id']}", cast_to=dict) == pack
    after = chat(client, extra_body={"demo_pack": pack["id"]})
    assert (after.choices, after.usage) == (before.choices, before.usage)
    assert register(client, count=3) == pack
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("request_fields", "kind", "reason"),
    [
        ({"messages": [asked(side=101)]}, openai.BadRequestError, "101 x 101 pixels"),
        ({"messages": [asked(text="<image>")]}, openai.BadRequestError, "control token <image>"),
        ({"messages": [asked()], "max_tokens": 2048}, openai.BadRequestError, "the model reads 2048"),
        ({"messages": [asked()], "model": "other"}, openai.NotFoundError, "'tiny' is"),
        ({"messages": [asked()], "extra_body": {"demo_pack": "none"}}, openai.NotFoundError, "pack"),
        ({"messages": [asked()], "temperature": 1}, openai.BadRequestError, "decoding is greedy"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_request_that_cannot_be_served_raises_what_the_client_expects(
    client, request_fields, kind, reason, stream
):
    with pytest.raises(kind, match=reason) as caught:
        client.chat.completions.create(**{"model": "tiny", "stream": stream} | request_fields)
    assert caught.value.type == "invalid_request_error"


def test_models_and_packs_that_do_not_exist_are_not_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mmicl"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="is not the id of a pack"):
        client.get("/demo_packs/none", cast_to=dict)


def test_compressor_and_generator_run_as_deployments_with_their_own_replicas(client):
    deployments = serve.status().applications[app.APPLICATION].deployments
    replicas = {name: sum(status.replica_states.values()) for name, status in deployments.items()}
    assert replicas == {"ingress": 1, "compressor": 1, "generator": 1}


def test_second_server_on_the_same_port_is_refused_and_the_first_goes_on(client, run):
    with pytest.raises(ConfigError, match=rf"serve.port {run.serve.port} cannot be listened on"):
        app.start(run)
    assert chat(client).usage.completion_tokens > 0


def test_server_whose_adapter_fits_another_model_does_not_start_and_leaves_nothing(
    ray_cluster, run, tmp_path
):
    app.stop()
    Aim(tiny_backbone(), AimConfig()).save(tmp_path / "foreign", {})
    settings = run.serve.model_copy(update={"adapter": str(tmp_path / "foreign"), "port": free_port()})
    with pytest.raises(ConfigError, match="is for backbone 'tiny-0', here it is "):
        app.start(run.model_copy(update={"serve": settings}))
    assert not serve.status().applications


def test_stopping_what_does_not_run_is_no_error(ray_cluster):
    app.stop()
    app.stop()
    assert not serve.status().applications

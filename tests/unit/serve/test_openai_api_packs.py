"""Packs of demonstrations and embeddings over HTTP."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest

from pipelines.serve.keys import add_key
from tests.served import AIM, BASE, FakeGenerator, ask, call, data_uri, error_of, make_services, png

OTHER = replace(AIM, id="nano@other", maker={**AIM.maker, "adapter": "c" * 64})


def shot(number=1, **fields):
    return {"image_url": data_uri(png(number)), "question": "This is", "answer": "bako"} | fields


def register(services, *demonstrations, **fields):
    return call(services, "POST", "/v1/demo_packs", json={"demonstrations": list(demonstrations)} | fields)


@pytest.fixture
def services(tmp_path):
    return make_services(tmp_path, max_images=3, max_packs=2)


def test_pack_is_registered_described_listed_and_deleted(services):
    made = register(services, shot(1), shot(2)).json()
    assert {name: made[name] for name in made if name not in ("id", "created")} == {
        "object": "demo_pack",
        "model": "nano@aim",
        "demonstrations": 2,
        "tokens_full": 38,
        "tokens_fused": 6,
    }
    assert made == call(services, "GET", f"/v1/demo_packs/{made['id']}").json()
    newer = register(services, shot(3)).json()
    listed = call(services, "GET", "/v1/demo_packs").json()
    assert listed["object"] == "list"
    assert sorted(one["id"] for one in listed["data"]) == sorted([made["id"], newer["id"]])
    gone = call(services, "DELETE", f"/v1/demo_packs/{made['id']}").json()
    assert gone == {"id": made["id"], "object": "demo_pack", "deleted": True}
    assert call(services, "GET", "/v1/demo_packs").json()["data"] == [newer]
    for method in ("GET", "DELETE"):
        error = error_of(call(services, method, f"/v1/demo_packs/{made['id']}"), 404)
        assert error["code"] == "demo_pack_not_found"


def test_equal_demonstrations_give_the_pack_that_is_there(services):
    assert register(services, shot(1)).json() == register(services, shot(1)).json()
    assert len(call(services, "GET", "/v1/demo_packs").json()["data"]) == 1


def test_pack_over_the_number_allowed_is_refused_and_no_retry_helps(services):
    register(services, shot(1))
    register(services, shot(2))
    response = register(services, shot(3))
    assert error_of(response, 409)["code"] == "demo_bank_full"
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("demonstrations", "param"),
    [
        ([], "demonstrations"),
        ([{"question": "This is", "answer": "bako"}], "demonstrations.0"),
        ([shot(image="aa==")], "demonstrations.0"),
        ([{"image_url": data_uri(png()), "question": "This is"}], "demonstrations.0.answer"),
        ([shot(answer="")], "demonstrations.0.answer"),
        ([shot(image_url="cat.png")], "demonstrations.0.image_url.url"),
        ([shot(image_url="https://pictures.example/a.png")], "demonstrations.0.image_url.url"),
        ([{"image": "?", "question": "a", "answer": "b"}], "demonstrations.0.image"),
        ([{"images": [], "question": "a", "answer": "b"}], "demonstrations.0.images"),
        (
            [{"images": [data_uri(png()), "x"], "question": "a", "answer": "b"}],
            "demonstrations.0.images.1.url",
        ),
        ([shot()] * 4, "demonstrations.3.image_url.url"),
        ([shot(label=1)], "demonstrations.0.label"),
    ],
)
def test_pack_with_a_wrong_demonstration_is_refused_with_its_place(services, demonstrations, param):
    assert error_of(register(services, *demonstrations), 400)["param"] == param
    assert services.compressor.asked == []


@pytest.mark.parametrize(
    ("served", "named", "status", "word"),
    [
        ((BASE, AIM), None, 200, ""),
        ((BASE, AIM), AIM.id, 200, ""),
        ((BASE, AIM, OTHER), None, 400, "'nano@aim' or 'nano@other'"),
        ((BASE, AIM, OTHER), AIM.id, 200, ""),
        ((BASE,), None, 400, "no model that is served here"),
        ((BASE, AIM), BASE.id, 400, "'nano@aim' does"),
        ((BASE, AIM), "gpt-4o", 404, "'gpt-4o'"),
    ],
)
def test_model_may_be_left_out_where_one_alone_fuses(tmp_path, served, named, status, word):
    services = make_services(tmp_path, generator=FakeGenerator(models=served))
    response = register(services, shot(), model=named)
    assert response.status_code == status, response.text
    if status != 200:
        error = error_of(response, status)
        assert (error["param"], word in error["message"]) == ("model", True)


def test_pack_is_exported_and_imported_as_it_is(services, tmp_path):
    made = register(services, shot(1), shot(2)).json()
    export = call(services, "GET", f"/v1/demo_packs/{made['id']}/export")
    assert export.headers["content-type"] == "application/octet-stream"
    assert export.headers["content-disposition"] == f'attachment; filename="{made["id"]}.safetensors"'
    renamed = (replace(BASE, id="tiny"), replace(AIM, id="tiny@fuses"))
    other = make_services(tmp_path / "other", generator=FakeGenerator(models=renamed))
    taken = bring(other, export.content)
    assert taken.json() == made | {"model": "tiny@fuses", "created": taken.json()["created"]}
    assert ask(other, model="tiny@fuses", demo_pack=made["id"]).status_code == 200


def bring(services, data):
    headers = {"content-type": "application/octet-stream"}
    return call(services, "POST", "/v1/demo_packs/import", content=data, headers=headers)


@pytest.mark.parametrize("data", [b"", b"{}", b"\x80" + bytes(7), b"not a pack" * 100])
def test_file_that_is_no_pack_is_refused(services, data):
    assert error_of(bring(services, data), 409)["code"] == "demo_pack_unusable"


def test_pack_of_another_model_is_not_imported(services, tmp_path):
    made = register(services, shot(1)).json()
    export = call(services, "GET", f"/v1/demo_packs/{made['id']}/export").content
    for models in ((BASE, OTHER), (BASE,)):
        other = make_services(tmp_path / "other", generator=FakeGenerator(models=models))
        assert error_of(bring(other, export), 409)["code"] == "demo_pack_unusable"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/demo_packs/pack-" + "0" * 32),
        ("GET", "/v1/demo_packs/..%2f..%2fetc"),
        ("GET", "/v1/demo_packs/x/export"),
        ("DELETE", "/v1/demo_packs/%00"),
    ],
)
def test_pack_that_is_not_there_is_not_found(services, method, path):
    assert error_of(call(services, method, path), 404)["type"] == "invalid_request_error"


def test_packs_of_one_tenant_are_not_there_for_another(tmp_path):
    keys = tmp_path / "keys"
    mine, other = ({"authorization": f"Bearer {add_key(keys, name)}"} for name in ("mine", "other"))
    services = make_services(tmp_path, keys=str(keys))
    body = {"demonstrations": [shot()]}
    assert error_of(call(services, "POST", "/v1/demo_packs", json=body), 401)["code"] == "invalid_api_key"
    made = call(services, "POST", "/v1/demo_packs", json=body, headers=mine).json()
    assert services.compressor.asked[0][2] == "mine"
    assert call(services, "GET", f"/v1/demo_packs/{made['id']}", headers=mine).json() == made
    assert error_of(call(services, "GET", f"/v1/demo_packs/{made['id']}", headers=other), 404)
    assert call(services, "GET", "/v1/demo_packs", headers=other).json()["data"] == []
    chat = {"model": AIM.id, "messages": [{"role": "user", "content": "a"}], "demo_pack": made["id"]}
    error_of(call(services, "POST", "/v1/chat/completions", json=chat, headers=other), 404)
    assert call(services, "POST", "/v1/chat/completions", json=chat, headers=mine).status_code == 200


def embed(services, sent, **fields):
    return call(services, "POST", "/v1/embeddings", json={"model": "nano", "input": sent} | fields)


def test_pictures_are_embedded_in_each_form_and_in_their_order(services):
    first, second, third = (data_uri(png(number)) for number in range(3))
    sent = [first, {"image_url": second}, {"type": "image_url", "image_url": {"url": third}}]
    told = embed(services, sent).json()
    assert services.compressor.asked == [("embed", (png(0), png(1), png(2)))]
    assert (told["object"], told["model"]) == ("list", "nano")
    assert [one["index"] for one in told["data"]] == [0, 1, 2]
    assert np.linalg.norm(told["data"][0]["embedding"]) == pytest.approx(1)
    assert told["usage"] == {"prompt_tokens": 48, "total_tokens": 48}
    assert (
        embed(services, second, model=AIM.id).json()["data"][0]["embedding"] == told["data"][1]["embedding"]
    )


def test_base64_holds_the_same_numbers_in_half_precision_of_python(services):
    plain = embed(services, data_uri(png())).json()["data"][0]["embedding"]
    told = embed(services, data_uri(png()), encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(told), "<f4") == pytest.approx(plain, abs=1e-7)


@pytest.mark.parametrize(
    ("sent", "fields", "status", "param"),
    [
        ("a text", {}, 400, "input"),
        (["a text"], {}, 400, "input"),
        ([data_uri(png()), "https://pictures.example/cat.png"], {}, 400, "input"),
        ([1, 2, 3], {}, 400, "input.0"),
        ([], {}, 400, "input"),
        ({"image_url": "cat.png"}, {}, 400, "input.0"),
        ([data_uri(png())] * 4, {}, 400, "input.3"),
        (data_uri(b"no picture"), {}, 400, "input.0"),
        (data_uri(png()), {"dimensions": 5}, 400, "dimensions"),
        (data_uri(png()), {"encoding_format": "hex"}, 400, "encoding_format"),
        (data_uri(png()), {"model": "text-embedding-3-small"}, 404, "model"),
    ],
)
def test_embedding_that_cannot_be_made_is_refused_with_its_place(services, sent, fields, status, param):
    assert error_of(embed(services, sent, **fields), status)["param"] == param
    assert services.compressor.asked == []

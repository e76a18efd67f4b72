from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import pipelines.serve
from mmicl_core.config.serve import ServeConfig
from pipelines.serve.page import page_router

FOLDER = Path(pipelines.serve.__file__).parent / "playground"
FILES = sorted(path.name for path in FOLDER.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(page_router(ServeConfig(max_images=3, max_image_bytes=2048)))
    return TestClient(app)


@pytest.mark.parametrize("name", FILES)
def test_file_of_the_page_is_served_as_it_is_under_the_policy(client, name):
    answer = client.get(f"/playground/{name}")
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; img-src 'self' data: blob:;")
    assert "unsafe" not in policy


def test_root_is_the_page(client):
    answer = client.get("/")
    assert answer.text == (FOLDER / "index.html").read_text(encoding="utf-8")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_scripts_come_as_scripts_which_browsers_ask_of_modules(client):
    kinds = {client.get(f"/playground/{name}").headers["content-type"] for name in SCRIPTS}
    assert kinds == {"text/javascript; charset=utf-8"}


@pytest.mark.parametrize("before", ["", "W/", '"another", '])
def test_file_that_the_browser_has_is_not_sent_again(client, before):
    first = client.get("/playground/style.css")
    again = client.get("/playground/style.css", headers={"If-None-Match": before + first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert again.headers["cache-control"] == "no-cache"


def test_file_that_changed_is_sent_whole(client):
    answer = client.get("/playground/style.css", headers={"If-None-Match": '"of another version"'})
    assert answer.status_code == 200 and answer.content


@pytest.mark.parametrize(
    "name", ["none.js", "..%2Fpage.py", "%2e%2e/page.py", "..%5cpage.py", "%00", "a" * 9000]
)
def test_nothing_but_the_files_of_the_page_can_be_read(client, name):
    answer = client.get(f"/playground/{name}")
    assert answer.status_code == 404
    assert "page_router" not in answer.text and len(answer.content) < 200


def test_head_tells_the_size_and_sends_nothing(client):
    answer = client.head("/")
    assert answer.content == b""
    assert int(answer.headers["content-length"]) == len((FOLDER / "index.html").read_bytes())


def test_page_is_told_the_limits_of_this_server(client):
    assert client.get("/playground/limits.json").json() == {
        "max_images": 3,
        "max_image_bytes": 2048,
        "max_image_pixels": ServeConfig().max_image_pixels,
    }


def test_page_names_no_address_of_another_host():
    for name in FILES:
        if not name.endswith(".webp"):
            found = re.findall(r"https?://[^\s\"'<)]+", (FOLDER / name).read_text(encoding="utf-8"))
            assert set(found) <= {"http://www.w3.org/2000/svg"}, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_never_make_markup_of_text(name):
    script = (FOLDER / name).read_text(encoding="utf-8")
    makes_markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc"
    assert re.findall(makes_markup, script) == []
    # A key outlives neither the tab nor the browser.
    assert "localStorage" not in script and "cookie" not in script

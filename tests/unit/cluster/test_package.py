from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from cluster import package
from cluster.checks import look_at_package
from cluster.leaks import find_secrets
from cluster.package import checkout, gather, inside
from mmicl_core.errors import ConfigError


def write(root: Path, *names: str, text: str = "x") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_checkout_travels_without_history_tests_results_weights_and_data(tmp_path):
    kept = [
        "pipelines/cli.py",
        "mmicl_core/data/files.py",
        "mmicl_core/assets/nano/model.safetensors",
        "a.yaml",
    ]
    left = [".git/config", ".venv/bin/python", "tests/test_x.py", "runs/a/b", ".mypy_cache/x", "data/x.jpg"]
    left += ["models/x", "own.safetensors", "deep/er/weights.pt", "corpus.tar", "a.parquet", "x.egg-info/PKG"]
    left += ["pipelines/__pycache__/cli.pyc", "build/x", "train.log"]
    assert list(gather(write(tmp_path, *kept, *left)).sizes) == sorted(kept)


def test_ignore_files_hold_for_their_folder_and_below(tmp_path):
    write(tmp_path, "a/keep.py", "a/drop.csv", "a/b/drop.csv", "c/drop.csv", "secret/x", "big/x")
    write(tmp_path, "a/.gitignore", text="*.csv\n")
    write(tmp_path, ".rayignore", text="/secret/\nbig\n!a/keep.py\n")
    assert set(gather(tmp_path).sizes) == {".rayignore", "a/.gitignore", "a/keep.py", "c/drop.csv"}


def test_links_travel_only_to_files_of_the_checkout(tmp_path):
    outside = write(tmp_path / "home", "credentials")
    root = write(tmp_path / "checkout", "real.py", "folder/x.py")
    (root / "alias.py").symlink_to("real.py")
    (root / "stolen").symlink_to(outside / "credentials")
    (root / "round").symlink_to(root, target_is_directory=True)
    found = gather(root)
    assert list(found.sizes) == ["alias.py", "folder/x.py", "real.py"]
    assert found.links == ("round", "stolen")


def test_archive_holds_what_was_told_and_has_the_size_that_was_told(tmp_path):
    root = write(tmp_path / "root", "a.py", "b/ü.py", text="content")
    (root / "a.py").chmod(0o755)
    found = gather(root)
    found.write(tmp_path / "x.zip")
    assert (tmp_path / "x.zip").stat().st_size == found.total_bytes
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.namelist() == ["a.py", "b/ü.py"]
        assert archive.read("b/ü.py") == b"content"
        assert archive.getinfo("a.py").external_attr >> 16 & 0o777 == 0o755


def test_archive_of_unchanged_files_is_the_same_so_that_it_is_sent_once(tmp_path):
    root = write(tmp_path / "root", "a.py", "b.py")
    gather(root).write(tmp_path / "1.zip")
    os.utime(root / "a.py", (1, 1))
    gather(root).write(tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()


def test_package_that_is_too_large_is_refused_and_names_its_largest_files(tmp_path):
    write(tmp_path, "small.py")
    write(tmp_path, "large.csv", text="x" * 5000)
    fits, refused = (look_at_package(gather(tmp_path), limit)[0] for limit in (10_000, 5_000))
    assert fits.passed and "of at most 10,000" in fits.says
    assert not refused.passed
    assert "large.csv (5,000 bytes), small.py (1 bytes)" in refused.says
    assert "takes fewer than 5,000" in refused.says
    assert ".rayignore" in refused.says


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.local",
        "deploy/.env",
        "tls/server.pem",
        "server.key",
        "id_rsa",
        "id_ed25519",
        ".aws/config",
    ]
    + [".netrc", "x/.git-credentials"],
)
def test_file_that_is_called_like_a_secret_is_one_sentence_with_a_remedy(tmp_path, name):
    (sentence,) = find_secrets(gather(write(tmp_path, "code.py", name)))
    assert sentence.startswith(f"{name} is called as files of secrets are")
    assert f"echo /{name} >> .rayignore" in sentence


# Put together here, so that no scanner takes this file for a leak.
TOKENS = {
    "an AWS access key": "AKIA" + "IOSFODNN7EXAMPLE",
    "a passing AWS access key": "ASIA" + "IOSFODNN7EXAMPLE",
    "a Hugging Face token": "hf_" + "a1B2" * 9,
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "a fine-grained GitHub token": "github_pat_" + "a1B2" * 15,
    "a Google API key": "AIza" + "a1B2c" * 7,
    "an OpenAI key": "sk-proj-" + "a1B2" * 12,
    "an API key of mmicl serve": "mmicl-" + "a1_B2-c" * 6 + "d",
    "a private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "a token of a Ray cluster": "export RAY_AUTH_" + "TOKEN=" + "0f" * 32,
}


@pytest.mark.parametrize("kind", TOKENS)
def test_token_in_a_text_file_is_found_and_not_repeated(tmp_path, kind):
    write(tmp_path, "pipelines/notes.md", text=f"first line\nuse {TOKENS[kind]} here\n")
    (sentence,) = find_secrets(gather(tmp_path))
    assert sentence.startswith(f"pipelines/notes.md:2 looks like {kind}, and would travel: ")
    assert TOKENS[kind].split()[-1] not in sentence


@pytest.mark.parametrize(
    "text",
    [
        "RAY_AUTH_TOKEN=<your token>",
        "RAY_AUTH_TOKEN=$(cat token)",
        'AUTH_TOKEN = "RAY_AUTH_TOKEN"',
        "hf_hub_download",
    ]
    + ["mmicl-train-20260101-ab12", "sk-learn", "ghp_short", 'key: {name: "RAY_AUTH_TOKEN", secret: x}'],
)
def test_what_only_resembles_a_token_is_let_through(tmp_path, text):
    assert find_secrets(gather(write(tmp_path, "notes.md", text=text))) == []


def test_secret_that_is_ignored_does_not_travel_and_is_no_matter(tmp_path):
    write(tmp_path, ".env", "tests/key.pem", "a.py")
    write(tmp_path, ".rayignore", text="/.env\n")
    found = gather(tmp_path)
    assert set(found.sizes) == {".rayignore", "a.py"}
    assert find_secrets(found) == []


def test_this_checkout_can_be_sent():
    found = gather(checkout())
    assert [finding for finding in look_at_package(found, 100 * 2**20) if not finding.passed] == []
    assert {"constraints.txt", "pipelines/recipes/quickstart.yaml", "cluster/submit.py"} <= set(found.sizes)
    assert not [name for name in found.sizes if name.startswith(("tests/", "runs/", ".git/", ".venv/"))]
    assert found.holds("pipelines/recipes") and found.holds("./pipelines/recipes/*.yaml")
    assert not found.holds("tests") and not found.holds("recipes")


def test_recipe_outside_the_checkout_is_refused(tmp_path):
    assert inside(checkout(), checkout() / "pipelines" / "cli.py") == "pipelines/cli.py"
    with pytest.raises(ConfigError, match="lies outside the checkout"):
        inside(checkout(), write(tmp_path, "mine.yaml") / "mine.yaml")


def test_installed_package_cannot_be_submitted(monkeypatch, tmp_path):
    monkeypatch.setattr(package, "__file__", str(tmp_path / "cluster" / "package.py"))
    with pytest.raises(ConfigError, match="is not a checkout"):
        checkout()

"""`mmicl submit` against a job server that only says what it is told to."""

from __future__ import annotations

import json
import re
import resource
import shlex
import socket
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from cluster import checks
from cluster.package import checkout
from pipelines import cli, submission
from tests.job_server import FakeJobServer, job_of

pytestmark = pytest.mark.usefixtures("no_token")

OUTPUT = ("--output", "/mnt/shared/runs")


@pytest.fixture
def server():
    with FakeJobServer() as fake:
        yield fake


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["submit", *arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def dry_run(capsys, server: FakeJobServer, *arguments: str) -> dict:
    code, out, err = run(capsys, *arguments, "--address", server.address, "--dry-run")
    assert (code, err) == (0, "")
    return json.loads(out)


def refused(capsys, address: str, *arguments: str) -> str:
    """The sentence for which a submission is refused; nothing was sent."""
    code, out, err = run(capsys, "train", *OUTPUT, "--address", address, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    return err.removeprefix("mmicl: ")


def test_dry_run_tells_all_and_sends_nothing(capsys, server):
    job = dry_run(capsys, server, "train", "--train.steps", "3", "--output", "/mnt/my runs")
    assert job["passed"] and all(finding["passed"] for finding in job["findings"])
    assert {finding["what"] for finding in job["findings"]} == {
        "server",
        "ray",
        "python",
        "package",
        "storage",
    }
    command = shlex.split(job["entrypoint"])
    assert command == [
        "python",
        "-m",
        "pipelines.cli",
        "train",
        "--train.steps",
        "3",
        "--output",
        "/mnt/my runs",
    ]
    assert re.fullmatch(r"mmicl-train-\d{8}-[0-9a-f]{4}", job["job"])
    assert job["address"] == server.address
    assert job["runtime_env"] == {"working_dir": str(checkout())}
    assert job["package"]["limit_bytes"] == 512 * 2**20
    assert job["package"]["largest"][0]["bytes"] < job["package"]["bytes"] < 100 * 2**20
    assert (job["cluster"]["nodes"], job["cluster"]["ray"]) == (1, server.ray)
    assert {asked.partition(" ")[0] for asked in server.asked} == {"GET"}


@pytest.mark.parametrize("answers", [True, False])
def test_dry_run_answers_within_seconds_and_without_ray(answers):
    with FakeJobServer() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        address = server.address if answers else f"http://127.0.0.1:{silent.getsockname()[1]}"
        arguments = ["submit", "train", *OUTPUT, "--address", address, "--dry-run"]
        code = f"import sys; from pipelines import cli; print(cli.main({arguments}), 'ray' in sys.modules)"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=checkout(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == ("0 False" if answers else "2 False")
    # What it computes and what it waits; others may use the processor meanwhile.
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took + submission.DRY_RUN_SECONDS < 3


def test_dry_run_leaves_no_folder_behind(capsys, monkeypatch, tmp_path, server):
    monkeypatch.chdir(tmp_path)
    dry_run(capsys, server, "train", *OUTPUT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["quickstart", str(cli.find_recipe("quickstart"))])
def test_recipe_is_named_as_the_job_finds_it(capsys, monkeypatch, tmp_path, server, name):
    monkeypatch.chdir(tmp_path)
    job = dry_run(capsys, server, "evaluate", "--recipe", name, *OUTPUT)
    assert shlex.split(job["entrypoint"])[4:6] == ["--recipe", "pipelines/recipes/quickstart.yaml"]


@pytest.mark.parametrize(
    ("verb", "command"),
    [("chain", ["chain"]), ("episodes,train", ["chain", "episodes,train"]), ("serve", ["serve"])],
)
def test_verbs_become_one_command(capsys, server, verb, command):
    job = dry_run(capsys, server, verb, *OUTPUT, "--serve.bank", "/mnt/bank")
    assert shlex.split(job["entrypoint"])[3:] == [*command, *OUTPUT, "--serve.bank", "/mnt/bank"]
    assert job["job"].startswith(f"mmicl-{command[0]}-")


def test_packages_are_installed_as_pinned_only_if_asked_and_never_ray(capsys, server):
    packages = dry_run(capsys, server, "train", *OUTPUT, "--pip")["runtime_env"]["pip"]["packages"]
    assert packages[0] == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert any(name.startswith("torch") for name in packages)
    assert not any(name.startswith("ray") for name in packages)


def test_no_token_is_one_sentence_that_says_how_to_set_it(capsys, server):
    server.token = "t0"
    said = refused(capsys, server.address)
    assert "wants a token and got none: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in said


def test_wrong_token_is_one_sentence_that_says_where_it_came_from(capsys, monkeypatch, server, tmp_path):
    server.token = "t0"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t1")
    assert "refuses the token from RAY_AUTH_TOKEN: set" in refused(capsys, server.address)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert "RAY_AUTH_TOKEN_PATH=" in refused(capsys, server.address)
    (tmp_path / "token").write_text("t1\n")
    assert f"refuses the token from {tmp_path / 'token'}: set" in refused(capsys, server.address)
    assert "t1" not in refused(capsys, server.address).partition("refuses")[0]


def test_right_token_is_shown_and_never_if_authentication_is_off(capsys, monkeypatch, server):
    server.token = "t0"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0")
    assert "with the token" in dry_run(capsys, server, "train", *OUTPUT)["findings"][0]["says"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "got none" in refused(capsys, server.address)


def test_another_ray_is_one_sentence_with_both_versions(capsys, server):
    ours, server.ray = server.ray, "2.61.0"
    said = refused(capsys, server.address)
    assert f"runs Ray 2.61.0, and Ray {ours} is installed here" in said


def test_another_python_is_one_sentence_with_both_versions(capsys, server):
    ours, server.python = server.python, "3.99.1"
    said = refused(capsys, server.address)
    assert f"runs Python 3.99.1, and this is Python {ours}" in said
    server.python = ".".join([*ours.split(".")[:2], "99"])
    assert dry_run(capsys, server, "train", *OUTPUT)["passed"]


def test_older_server_takes_smaller_packages(monkeypatch):
    assert [checks.limit_bytes(ray) // 2**20 for ray in ("2.45.0", "2.59.1", "2.60.0", "3.0.0.dev0")] == [
        100,
        100,
        512,
        512,
    ]


def test_address_that_does_not_answer_is_one_sentence(capsys):
    # Port 1 is reserved, nothing listens there.
    said = refused(capsys, "http://127.0.0.1:1")
    assert said.startswith("--address http://127.0.0.1:1 does not answer (")
    assert "Connection refused" in said


def test_server_that_stays_silent_is_given_up_within_seconds(capsys, monkeypatch):
    monkeypatch.setattr(submission, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "does not answer (timed out)" in refused(capsys, f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("head:8265", "is not http://HOST:8265"),
        ("ray://head:10001", "ray:// is for Ray Client, which takes no jobs"),
        ("http://", "is not http://HOST:8265"),
    ],
)
def test_address_that_is_none_of_a_dashboard_is_one_sentence(capsys, address, said):
    assert said in refused(capsys, address)


@pytest.mark.parametrize(
    ("status", "said"), [(404, "is not the dashboard"), (503, "cannot answer /api/version now")]
)
def test_server_that_is_no_dashboard_or_broken_is_one_sentence(capsys, server, status, said):
    server.status = status
    assert said in refused(capsys, server.address)


def test_package_that_is_too_large_is_one_sentence(capsys, monkeypatch, server):
    monkeypatch.setattr(checks, "LARGE_BYTES", 10**6)
    said = refused(capsys, server.address)
    assert "takes fewer than 1,000,000; the largest are mmicl_core/assets/" in said


@pytest.fixture
def small_checkout(monkeypatch, tmp_path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").write_text("[project]\ndependencies = []\n", encoding="utf-8")
    monkeypatch.setattr(submission, "checkout", lambda: root)
    return root


def test_secret_in_the_tree_is_one_sentence(capsys, server, small_checkout):
    (small_checkout / ".env").write_text("PASSWORD=x\n", encoding="utf-8")
    assert ".env is called as files of secrets are" in refused(capsys, server.address)
    (small_checkout / ".rayignore").write_text("/.env\n", encoding="utf-8")
    assert dry_run(capsys, server, "train", *OUTPUT)["passed"]


def test_everything_that_is_wrong_is_told_at_once(capsys, server, small_checkout):
    (small_checkout / ".env").touch()
    server.ray, server.python = "2.61.0", "3.99.1"
    code, out, err = run(capsys, "train", "--address", server.address, "--dry-run")
    assert code == 2
    report = json.loads(out)
    assert not report["passed"]
    wrong = [finding["what"] for finding in report["findings"] if not finding["passed"]]
    assert wrong == ["ray", "python", "secret", "storage"]
    assert err.count("\n") == 4


def storage(capsys, server: FakeJobServer, *arguments: str) -> list[str]:
    code, out, _ = run(capsys, *arguments, "--address", server.address, "--dry-run")
    found = [finding for finding in json.loads(out)["findings"] if finding["what"] == "storage"]
    wrong = [finding["says"] for finding in found if not finding["passed"]]
    assert code == (2 if wrong else 0)
    return wrong


def test_results_in_a_relative_folder_would_go_with_the_job(capsys, server):
    (wrong,) = storage(capsys, server, "episodes")
    assert wrong.startswith(
        "--output runs is relative, which in a job is a folder that goes when the job ends"
    )
    (wrong,) = storage(capsys, server, "serve")
    assert wrong.startswith("serve.bank runs/bank is relative")


def test_path_of_one_machine_is_refused_on_several_nodes_unless_it_is_shared(capsys, server):
    paths = ["--corpus.path", "/mnt/nfs/pairs", "--output", "/mnt/nfs/runs"]
    assert storage(capsys, server, "train", *paths) == []
    server.nodes = 3
    corpus, output = storage(capsys, server, "train", *paths)
    assert corpus.startswith("corpus.path /mnt/nfs/pairs is a path of one machine")
    assert "the cluster has 3 nodes" in output and "--shared /mnt/nfs" in output
    assert storage(capsys, server, "train", *paths, "--shared", "/mnt/nfs") == []
    assert len(storage(capsys, server, "train", *paths, "--shared", "/mnt/n")) == 2
    (output,) = storage(capsys, server, "train", "--corpus.path", "s3://bucket/x", *paths[2:])
    assert output.startswith("--output")


def test_relative_path_must_travel_with_the_job(capsys, server, small_checkout):
    (wrong,) = storage(capsys, server, "episodes", *OUTPUT, "--corpus.path", "pairs/*.tsv")
    assert wrong.startswith("corpus.path pairs/*.tsv is relative, and does not travel with the job")
    (small_checkout / "pairs").mkdir()
    (small_checkout / "pairs" / "a.tsv").touch()
    assert storage(capsys, server, "episodes", *OUTPUT, "--corpus.path", "pairs/*.tsv") == []


def test_settings_of_a_verb_that_is_not_run_do_not_matter(capsys, server):
    task = ["--evaluate.tasks", '[{"type": "vqa", "folder": "vqa"}]']
    assert storage(capsys, server, "train", *OUTPUT, *task) == []
    (wrong,) = storage(capsys, server, "chain", *OUTPUT, *task)
    assert wrong.startswith("evaluate.tasks vqa vqa is relative")
    adapters = ["--serve.adapters", '{"mine": "mine"}', "--serve.bank", "/mnt/bank"]
    (wrong,) = storage(capsys, server, "serve", *adapters)
    assert wrong.startswith("serve.adapters mine mine is relative")


def test_what_the_models_of_an_evaluation_are_trained_on_is_looked_for_too(capsys, server):
    def wrong(**model):
        models = json.dumps([{"name": "mine", "recipe": "lora_nano", **model}])
        return storage(capsys, server, "evaluate", *OUTPUT, "--evaluate.models", models)

    assert wrong() == wrong(backbone="embedded:nano") == []
    (corpus,) = wrong(settings={"corpus.path": "pairs"}, train_seeds=[0, 1])
    assert corpus.startswith("evaluate.models mine pairs is relative")
    (backbone,) = wrong(backbone="smol")
    assert backbone.startswith("evaluate.models mine smol is relative")


def test_detached_submission_sends_the_package_and_prints_the_job(capsys, server):
    code, out, err = run(
        capsys, "train", *OUTPUT, "--address", server.address, "--detach", "--name", "mine.1"
    )
    assert code == 0, err
    assert json.loads(out) == {"job": "mine.1", "address": server.address}
    assert f"`mmicl submit logs mine.1 --address {server.address}` follows it again" in err
    assert re.search(r"package: \d+ files, [\d,]+ bytes of at most 536,870,912", err)
    (sent,) = server.jobs
    assert sent["entrypoint"] == "python -m pipelines.cli train --output /mnt/shared/runs"
    # Nothing is reserved, so that the entry point starts on a cluster that is full.
    assert not any(sent.get(f"entrypoint_num_{what}") for what in ("cpus", "gpus"))
    ((path, package),) = server.packages.items()
    assert sent["runtime_env"]["working_dir"] == path.replace("/api/packages/gcs/", "gcs://")
    names = zipfile.ZipFile(BytesIO(package)).namelist()
    assert "pipelines/cli.py" in names and not any(name.startswith("tests/") for name in names)


def test_package_that_the_cluster_has_is_not_sent_again_and_a_name_is_used_once(capsys, server):
    arguments = ["train", *OUTPUT, "--address", server.address, "--detach", "--name", "mine"]
    assert run(capsys, *arguments)[0] == 0
    server.asked.clear()
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.splitlines()[-1].endswith("did not take the job: ValueError: Job mine already exists..")
    assert not any(asked.startswith("PUT") for asked in server.asked)


@pytest.mark.parametrize("name", ["-x", "a b", "a/b", ""])
def test_name_that_no_job_can_have_is_refused(capsys, server, name):
    assert f"--name {name}" in refused(capsys, server.address, f"--name={name}")


def test_jobs_are_listed_newest_first_without_those_of_drivers(capsys, server):
    server.jobs += [job_of("old"), job_of("new", "FAILED", start_time=86_400_000, driver_exit_code=3)]
    server.jobs.append(job_of("driver") | {"type": "DRIVER"})
    code, out, _ = run(capsys, "list", "--address", server.address)
    new, old = json.loads(out)
    assert code == 0
    assert (new["job"], new["status"], new["exit_code"]) == ("new", "failed", 3)
    assert new["started"] == "1970-01-02T00:00:00+00:00"
    assert (old["job"], old["status"], old["exit_code"]) == ("old", "pending", None)


def test_job_is_shown_and_stopped_by_its_name(capsys, server):
    server.jobs.append(job_of("mine", "RUNNING"))
    where = ["mine", "--address", server.address]
    assert json.loads(run(capsys, "status", *where)[1])["status"] == "running"
    assert json.loads(run(capsys, "stop", *where)[1])["status"] == "stopped"
    server.asked.clear()
    assert run(capsys, "stop", *where)[0] == 0
    assert server.asked == ["GET /api/jobs/mine"]


@pytest.mark.parametrize("action", ["logs", "status", "stop"])
def test_job_that_does_not_exist_is_one_sentence(capsys, server, action):
    code, out, err = run(capsys, action, "nobody", "--address", server.address)
    assert (code, out) == (2, "")
    assert "knows no job nobody: `mmicl submit list` names those that it knows" in err

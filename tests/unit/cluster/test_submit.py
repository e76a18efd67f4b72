from __future__ import annotations

import json
import shlex

import pytest

from cluster import submit
from mmicl_core.errors import ConfigError
from pipelines import cli


def dry_run(capsys, *arguments: str) -> dict:
    code = cli.main(["submit", *arguments, "--address", "http://head:8265", "--dry-run"])
    assert code == 0
    return json.loads(capsys.readouterr().out)


def test_dry_run_prints_the_same_command_that_was_typed(capsys):
    job = dry_run(capsys, "train", "--train.steps", "3", "--output", "/shared/my runs")
    command = shlex.split(job["entrypoint"])
    assert command[:3] == ["python", "-m", "pipelines.cli"]
    assert command[3:] == ["train", "--train.steps", "3", "--output", "/shared/my runs"]
    assert job["address"] == "http://head:8265"


@pytest.mark.parametrize("name", ["quickstart", str(cli.find_recipe("quickstart"))])
def test_recipe_is_named_as_the_job_finds_it(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    job = dry_run(capsys, "evaluate", "--recipe", name)
    assert shlex.split(job["entrypoint"])[4:] == ["--recipe", "pipelines/recipes/quickstart.yaml"]


def test_dry_run_leaves_no_folder_behind(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dry_run(capsys, "train")
    assert not list(tmp_path.iterdir())


def test_recipe_outside_the_checkout_is_refused(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train:\n  steps: 3\n", encoding="utf-8")
    assert cli.main(["submit", "train", "--address", "x", "--recipe", str(recipe)]) == 2
    assert "lies outside the checkout" in capsys.readouterr().err


def test_package_is_the_checkout_without_history_results_and_secrets(capsys):
    environment = dry_run(capsys, "train")["runtime_env"]
    assert environment["working_dir"] == str(submit.checkout())
    assert {".git", ".venv", ".*cache", "runs", ".env*", "*.pem", "*.key"} <= set(environment["excludes"])


def test_installed_package_cannot_be_submitted(monkeypatch, tmp_path):
    monkeypatch.setattr(submit, "__file__", str(tmp_path / "cluster" / "submit.py"))
    with pytest.raises(ConfigError, match="is not a checkout"):
        submit.checkout()


def test_cluster_that_does_not_answer_is_one_sentence(capsys):
    # Port 1 is reserved, nothing listens there.
    assert cli.main(["submit", "train", "--address", "http://127.0.0.1:1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("mmicl: --address http://127.0.0.1:1 did not take the job: ")
    assert told.count("\n") == 1


class FakeClient:
    """Ray's job client, with a job that prints one line."""

    status = "SUCCEEDED"
    interrupted = False
    stopped: list[str]

    def __init__(self, address: str) -> None:
        FakeClient.stopped = []

    def submit_job(self, *, entrypoint: str, runtime_env: dict) -> str:
        return "job-1"

    async def tail_job_logs(self, job_id: str):
        yield "line\n"
        if self.interrupted:
            raise KeyboardInterrupt

    def get_job_status(self, job_id: str):
        from ray.job_submission import JobStatus

        return JobStatus(self.status)

    def stop_job(self, job_id: str) -> None:
        FakeClient.stopped.append(job_id)


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 1)])
def test_exit_code_is_the_status_of_the_job(capsys, monkeypatch, status, code):
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", FakeClient)
    monkeypatch.setattr(FakeClient, "status", status)
    assert cli.main(["submit", "train", "--address", "x"]) == code
    told = capsys.readouterr()
    assert told.out == "line\n"
    assert told.err.splitlines()[-1] == f"mmicl: job-1 {status.lower()}"


def test_interruption_stops_the_job(monkeypatch):
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", FakeClient)
    monkeypatch.setattr(FakeClient, "interrupted", True)
    assert cli.main(["submit", "train", "--address", "x"]) == 130
    assert FakeClient.stopped == ["job-1"]

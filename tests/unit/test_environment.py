from __future__ import annotations

import os

import pytest
import ray

from pipelines import environment


@pytest.fixture
def connections(monkeypatch) -> list[dict]:
    """Settings of `ray.init` instead of a running Ray."""
    made: list[dict] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: made.append(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: made.append({"shutdown": True}))
    monkeypatch.setattr(environment.os, "environ", dict(os.environ))
    return made


def test_without_an_address_a_local_ray_is_started_and_stopped(connections):
    with environment.cluster():
        pass
    started, stopped = connections
    assert started["address"] == "local"
    assert started["include_dashboard"] is False
    assert started["log_to_driver"] is False
    assert stopped == {"shutdown": True}


def test_workers_of_a_checkout_find_its_packages_first(connections):
    environment.os.environ["PYTHONPATH"] = "/elsewhere"
    with environment.cluster():
        assert environment.os.environ["PYTHONPATH"].split(os.pathsep) == [
            str(environment.CODE),
            "/elsewhere",
        ]


@pytest.mark.parametrize(("cpus", "asked"), [(1, 2), (None, 2), (2, None), (16, None)])
def test_machine_with_one_cpu_still_trains_with_two_workers(connections, monkeypatch, cpus, asked):
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    with environment.cluster():
        pass
    assert connections[0]["num_cpus"] == asked


def test_address_is_connected_to_and_workers_get_the_environment(connections):
    environment.os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    with environment.cluster():
        pass
    assert "address" not in connections[0]
    variables = connections[0]["runtime_env"]["env_vars"]
    assert variables["PYTHONPATH"].startswith(str(environment.CODE))
    assert environment.DEFAULTS.keys() <= variables.keys()


def test_job_leaves_the_path_to_its_working_directory(connections):
    environment.os.environ.update(RAY_ADDRESS="10.0.0.1:6379", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    with environment.cluster():
        pass
    assert "PYTHONPATH" not in connections[0]["runtime_env"]["env_vars"]


def test_connection_that_exists_is_used_and_left(connections, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with environment.cluster():
        pass
    assert connections == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_ray_is_stopped_whatever_happens(connections, error):
    with pytest.raises(error), environment.cluster():
        raise error(15)
    assert connections[-1] == {"shutdown": True}


def test_what_the_user_set_is_kept(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    environment.prepare_process()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_log_lines_are_printed_once_however_often_the_process_is_prepared(capsys):
    environment.prepare_process()
    environment.prepare_process()
    environment.logging.getLogger("mmicl").info("once")
    assert capsys.readouterr().err == "once\n"


def test_only_the_line_that_says_the_log_level_is_set_is_held_back(connections, monkeypatch, capfd):
    def init(**settings) -> None:
        os.write(2, b"level from RAY_BACKEND_LOG_LEVEL\nsomething else\n")
        print("from Python", file=environment.sys.stderr)
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError), environment.cluster():
        pass
    assert sorted(capfd.readouterr().err.splitlines()) == ["from Python", "something else"]

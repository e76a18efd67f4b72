from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from mmicl_core.errors import CheckpointError, ConfigError, DataError
from pipelines import cli, environment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_ray(monkeypatch) -> list[str]:
    """Programs run without a cluster; what happens around them is written down."""
    happened: list[str] = []

    class Cluster:
        def __init__(self, *, verbose: bool) -> None:
            happened.append(f"up, verbose {verbose}")

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_) -> None:
            happened.append("down")

    monkeypatch.setattr(cli, "cluster", Cluster)
    return happened


@pytest.fixture
def program(monkeypatch):
    """Put a function in the place of a program."""

    def put(module: str, name: str, function) -> None:
        stand_in = ModuleType(module)
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)
        package, _, last = module.rpartition(".")
        if package in sys.modules:
            monkeypatch.setattr(sys.modules[package], last, stand_in, raising=False)

    return put


def test_help_names_every_verb_without_importing_a_program():
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'numpy', 'pydantic_settings', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for verb in (
        "quickstart",
        "corpus",
        "backbone",
        "episodes",
        "train",
        "evaluate",
        "chain",
        "serve",
        "submit",
        "doctor",
        "config",
    ):
        assert f"\n  {verb} " in done.stdout


def test_mistake_ends_the_process_with_one_sentence_and_code_2(tmp_path):
    command = [sys.executable, "-m", "pipelines.cli", "train", "--train.steps", "many"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("mmicl: the command line: train.steps: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "required: VERB"),
        (["tarin"], "invalid choice: 'tarin'"),
        (["train", "--train.stepz", "3"], "did you mean --train.steps?"),
        (["train", "--recipe", "nowhere"], "recipe nowhere does not exist"),
        (["train", "--output", "/dev/null/x"], "--output /dev/null/x cannot be a folder"),
        (["evaluate", "--evaluate.queries", "0"], "evaluate.queries: "),
        (
            ["chain", "--evaluate.models", '[{"name": "a", "recipe": "nowhere"}]'],
            "evaluate.models: 'a': recipe nowhere does not exist",
        ),
        (["quickstart", "--outptu", "x"], "unrecognized arguments: --outptu"),
        (["quickstart", "--recipe", "nowhere"], "recipe nowhere does not exist"),
        (["config"], "required: ACTION"),
        (["config", "schema", "x"], "unrecognized arguments: x"),
        (["config", "show", "--train.seed", "x"], "train.seed: "),
        (["corpus"], "required: ACTION"),
        (["corpus", "build", "closed-emoji", "--output", "x"], "invalid choice: 'closed-emoji'"),
        (["corpus", "build", "open-emoji"], "required: --output"),
        (
            ["corpus", "teacher", "--checkpoint", "no.pth", "--output", "x"],
            "--checkpoint no.pth does not exist",
        ),
        (["backbone"], "required: ACTION"),
        (["backbone", "build", "smal", "--output", "x"], "invalid choice: 'smal'"),
        (["backbone", "build", "smol"], "required: --output"),
        (["backbone", "build", "smol", "--output", "/dev/null/x"], "--output /dev/null cannot be a folder"),
        (
            ["backbone", "build", "smol", "--output", "/dev/null"],
            "--output /dev/null exists and is no backbone",
        ),
        (["submit", "train"], "required: --address"),
        (["submit", "config", "--address", "x"], "invalid choice: 'config'"),
        (["submit", "episodes,serve", "--address", "x"], "'serve' is no stage of a chain"),
        (["submit", "logs", "--address", "x"], "required: JOB"),
        (["chain", "train,serve"], "'serve' is no stage of a chain"),
        (["chain", "--train.stepz", "3"], "did you mean --train.steps?"),
        (["submit", "train", "--address", "x", "--train.stepz", "3"], "did you mean --train.steps?"),
        (["submit", "train", "--address", "x", "--recipe", __file__ + "x"], "does not exist"),
    ],
)
def test_mistake_is_told_in_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch, no_ray):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert no_ray == [], "a mistake must not start Ray"
    assert not list(tmp_path.iterdir()), "a mistake must not leave a folder behind"


def test_config_show_gives_the_whole_run_with_flags_applied(capsys):
    assert cli.main(["config", "show", "--recipe", "quickstart", "--train.steps", "12"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["train"]["steps"] == 12
    sections = ["corpus", "concepts", "embedder", "neighbours", "episodes"]
    assert list(run) == [*sections, "backbone", "method", "train", "evaluate", "serve"]


def test_config_schema_is_json_schema_of_every_section(capsys):
    assert cli.main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert {"train", "evaluate", "serve"} <= set(schema["properties"])


def test_verb_runs_its_program_with_settings_and_folder(capsys, tmp_path, no_ray, program):
    seen = []
    program("pipelines.compare", "compare", lambda run, root: seen.append((run, root)) or [{"adapted": 1}])
    folder = tmp_path / "a" / "b"
    assert cli.main(["evaluate", "--output", str(folder), "--evaluate.queries", "9"]) == 0
    ((run, root),) = seen
    assert (run.evaluate.queries, root) == (9, folder)
    assert folder.is_dir()
    assert json.loads(capsys.readouterr().out) == [{"adapted": 1}]
    assert no_ray == ["up, verbose False", "down"]


def test_mistake_found_by_a_program_is_one_sentence_after_the_cluster_is_down(
    capsys, tmp_path, no_ray, program
):
    def fail(run, root):
        raise DataError("corpus x holds no shard")

    program("pipelines.compare", "compare", fail)
    assert cli.main(["evaluate", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "mmicl: corpus x holds no shard\n"
    assert no_ray[-1] == "down"


@pytest.fixture
def stages(monkeypatch):
    """The stages of a chain, which write themselves down; their exit codes can be set."""
    ran, codes = [], {}

    def stand_in(name: str) -> cli.Verb:
        return cli.Verb("", lambda arguments: ran.append((name, *arguments)) or codes.get(name, 0))

    monkeypatch.setattr(cli, "VERBS", cli.VERBS | {name: stand_in(name) for name in cli.STAGES})
    return ran, codes


def test_chain_runs_its_stages_one_after_another_with_the_same_flags(tmp_path, no_ray, stages):
    flags = ["--output", str(tmp_path), "--train.steps", "3"]
    assert cli.main(["chain", *flags]) == 0
    assert stages[0] == [("episodes", *flags), ("train", *flags), ("evaluate", *flags)]
    stages[0].clear()
    assert cli.main(["chain", "train,evaluate", *flags]) == 0
    assert [name for name, *_ in stages[0]] == ["train", "evaluate"]


def test_chain_ends_with_the_first_stage_that_fails(tmp_path, no_ray, stages):
    ran, codes = stages
    codes["train"] = 3
    assert cli.main(["chain", "--output", str(tmp_path)]) == 3
    assert [name for name, *_ in ran] == ["episodes", "train"]


def test_mistake_found_by_a_worker_is_told_without_the_tracebacks_around_it(
    capsys, tmp_path, no_ray, program
):
    class WorkerError(Exception):
        def __init__(self) -> None:
            super().__init__("Traceback (most recent call last): ...")
            task_error = DataError("ray::task() Traceback ...")
            task_error.cause = CheckpointError("projection has shape [3], not [4]")
            self.worker_failures = {0: task_error}

    def fail(run, root):
        raise WorkerError

    program("pipelines.compare", "compare", fail)
    assert cli.main(["evaluate", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "mmicl: projection has shape [3], not [4]\n"


def test_bug_keeps_its_traceback(tmp_path, no_ray, program):
    def fail(run, root):
        raise ZeroDivisionError

    program("pipelines.compare", "compare", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", "--output", str(tmp_path)])
    assert no_ray[-1] == "down"


def test_interruption_stops_what_was_started_and_gives_130(capsys, tmp_path, no_ray, program):
    def interrupt(run, root):
        raise KeyboardInterrupt

    program("pipelines.compare", "compare", interrupt)
    assert cli.main(["evaluate", "--output", str(tmp_path)]) == 130
    assert no_ray[-1] == "down"
    assert capsys.readouterr().err == "mmicl: stopped\n"


class App:
    """Stands in for the server, and sends this process a signal once it is there."""

    def __init__(self, *signals: int) -> None:
        self.happened: list[str] = []
        self._signals = list(signals)

    def start(self, run) -> str:
        self.happened.append(f"port {run.serve.port}")
        threading.Thread(target=self._send).start()
        return "http://here"

    def reload(self, run) -> None:
        self.happened.append("reload")
        if len(self.happened) == 2:
            raise ConfigError("the adapter is broken")

    def stop(self) -> None:
        self.happened.append("stopped")

    def _send(self) -> None:
        for number in self._signals:
            time.sleep(0.1)
            os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server_is_stopped_when_it_is_interrupted_or_terminated(
    capsys, tmp_path, monkeypatch, no_ray, number
):
    from pipelines.serve import commands

    monkeypatch.setattr(commands, "app", server := App(number))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["serve", "--output", str(tmp_path), "--serve.port", "8123"]) == 130
    assert server.happened == ["port 8123", "stopped"]
    assert "serving at http://here" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_server_loads_its_adapters_anew_when_it_is_told_to_and_goes_on_where_it_cannot(
    capsys, tmp_path, monkeypatch, no_ray
):
    from pipelines.serve import commands

    monkeypatch.setattr(commands, "app", server := App(signal.SIGHUP, signal.SIGHUP, signal.SIGINT))
    assert cli.main(["serve", "--output", str(tmp_path)]) == 130
    assert server.happened == ["port 8000", "reload", "reload", "stopped"]
    said = capsys.readouterr().err
    assert "the adapters are served as they were: the adapter is broken" in said
    assert "the adapters are served as they are now" in said


def test_keys_are_made_listed_and_removed(capsys, tmp_path, no_ray):
    file = ["--file", str(tmp_path / "keys.jsonl")]

    def keys(*arguments):
        assert cli.main(["serve", "keys", *arguments, *file]) == 0
        return json.loads(capsys.readouterr().out)

    made = keys("add", "ann")
    assert made["name"] == "ann" and made["key"] not in (tmp_path / "keys.jsonl").read_text()
    keys("add", "bob")
    assert [entry["name"] for entry in keys("list")["keys"]] == ["ann", "bob"]
    keys("remove", "ann")
    assert [entry["name"] for entry in keys("list")["keys"]] == ["bob"]
    assert cli.main(["serve", "keys", "add", "bob", *file]) == 2
    assert cli.main(["serve", "keys"]) == 2
    assert not no_ray


def test_quickstart_takes_a_folder_and_a_recipe(tmp_path, no_ray, program):
    seen = []
    program("pipelines.quickstart", "quickstart", lambda output, recipe: seen.append((output, recipe)))
    assert cli.main(["quickstart", "--output", str(tmp_path)]) == 0
    assert cli.main(["quickstart", "--output", str(tmp_path), "--recipe", "quickstart", "--verbose"]) == 0
    assert seen == [(tmp_path, None), (tmp_path, environment.CODE / "pipelines/recipes/quickstart.yaml")]
    assert no_ray == ["up, verbose False", "down", "up, verbose True", "down"]


def test_log_lines_reach_stderr_as_they_are(capsys):
    cli.main(["config", "schema"])
    environment.logging.getLogger("mmicl").info("reading")
    assert capsys.readouterr().err == "reading\n"


def test_corpus_build_takes_things_or_everything(capsys, tmp_path, monkeypatch):
    from pipelines import corpus

    seen = []
    monkeypatch.setattr(
        corpus,
        "build_open_emoji",
        lambda output, packages, **rest: seen.append((output, rest)) or {"images": 3},
    )
    for flags in ([], ["--all"]):
        assert cli.main(["corpus", "build", "open-emoji", "--output", str(tmp_path / "c"), *flags]) == 0
    assert [len(rest["categories"]) for _, rest in seen] == [5, 10]
    assert '"images": 3' in capsys.readouterr().out


def test_corpus_build_without_the_renderer_says_what_to_install(capsys, tmp_path, monkeypatch):
    from pipelines import corpus

    monkeypatch.setattr(corpus, "RENDERER", "no_such_renderer")
    assert cli.main(["corpus", "build", "open-emoji", "--output", str(tmp_path / "c")]) == 2
    assert "pip install 'mmicl[corpus]'" in capsys.readouterr().err


def test_preview_takes_its_page_and_how_much_it_shows_beside_the_settings(tmp_path, capsys, no_ray, program):
    given = []

    def preview(run, root, *, page=None, most=24):
        given.append((run.episodes.seed, root, page, most))
        return {"shown": most}

    program("pipelines.inspection", "preview_episodes", preview)
    page, folder = tmp_path / "page.html", tmp_path / "runs"
    flags = ["--output", str(folder), "--episodes.seed", "3"]
    assert cli.main(["episodes", "preview", *flags, "--page", str(page), "--show", "5"]) == 0
    assert cli.main(["episodes", "preview", *flags]) == 0
    assert given == [(3, folder, page, 5), (3, folder, None, 24)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--show", "0"], "'0' is no whole number from 1 on"),
        (["--show", "many"], "'many' is no whole number from 1 on"),
        (["--page", "."], "--page . is a folder: name a file"),
        (["--pages", "x.html"], "--pages is not a setting; did you mean --page?"),
    ],
)
def test_preview_refuses_what_names_no_page_or_count(flags, said, capsys, no_ray):
    assert cli.main(["corpus", "preview", *flags]) == 2
    assert said in capsys.readouterr().err
    assert not no_ray

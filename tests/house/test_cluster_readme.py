"""The commands, tables and sums of `cluster/README.md`: run where possible, else read by what takes them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.scripts import scripts

from pipelines import cli
from pipelines.settings import parse_run
from tests.families import write_model
from tests.job_server import FakeJobServer
from tests.real_models import REAL

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")

# Why a program is not run here; what it names of this project has to exist all the same.
NOT_RUN = {
    "docker": "builds an image for minutes, and takes a daemon",
    "kind": "takes Docker",
    "curl": "asks what the commands before it have started",
    "prometheus": "is installed by whoever watches a cluster",
}
# Figures of the sizing table: peaks in TFLOP/s, and the share of them that is taken for granted.
PEAKS, REACHED, GPUS = (312, 989), 0.4, 8


@dataclass(frozen=True)
class Command:
    """A command of a block, and what the block shows that it prints."""

    words: tuple[str, ...]
    printed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks() -> list[str]:
    return [found.strip() for found in re.findall(r"^```\n(.*?)^```$", README, re.M | re.S)]


def commands() -> list[Command]:
    found: list[Command] = []
    for block in blocks():
        # A sum is no command.
        shows_output = block.startswith("$ ")
        for line in () if block.startswith("episodes a second") else block.splitlines():
            if shows_output and not line.startswith("$ "):
                found[-1].printed.append(line)
                continue
            for part in re.split(r" && ", line.removeprefix("$ ")):
                words = shlex.split(part)
                # What is set for one command only.
                while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                found.append(Command(tuple(words)))
    return found


COMMANDS = commands()


def of(*start: str) -> list[Command]:
    return [command for command in COMMANDS if command.words[: len(start)] == start]


def section(title: str) -> str:
    return re.split(r"^## ", README.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def rows(text: str) -> Iterator[list[str]]:
    """The rows of the tables of a text, without their headings."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in line.strip().strip("|").split("|")]


def is_told_as(told: str, value: float) -> bool:
    """Whether a table tells a number by three of its digits, or whole."""
    number = float(told.replace(",", ""))
    return number in (float(f"{value:.3g}"), value)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with outlines of the models that recipes name: all but their weights."""
    for name, (family, config) in REAL.items():
        folder = tmp_path / "models" / name
        write_model(family, folder)
        (folder / "model.safetensors").unlink()
        config().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    told = capsys.readouterr()
    return code, told.out, told.err


def test_every_command_is_looked_at_by_a_test_here():
    known = {"mmicl", "make", "ray", "kubectl", *NOT_RUN}
    assert len(COMMANDS) > 15
    assert [str(command) for command in COMMANDS if command.words[0] not in known] == []
    verbs = {command.words[1] for command in of("mmicl")}
    assert verbs <= {"train", "serve", "doctor", "chain", "submit"}


@pytest.mark.parametrize("title", ["Laptop", "One big machine", "Cloud launcher", "Kubernetes"])
def test_every_way_takes_three_commands(title):
    first = re.findall(r"^```\n(.*?)^```$", section(title), re.M | re.S)[0]
    assert len(first.strip().splitlines()) == 3


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_file_of_this_project_that_a_command_names_exists(command):
    for word in command.words[1:]:
        path = word.partition("=")[2] or word
        assert not path.startswith("cluster/") or (ROOT / path).exists(), path


@pytest.mark.parametrize("command", [one for one in of("mmicl", "train") if "--plan" in one.words], ids=str)
def test_plan_is_what_the_text_shows(command, elsewhere, capsys):
    code, _, err = run(capsys, *command.words[1:])
    assert code == 0
    assert [line for line in command.printed if line not in err.splitlines()] == []


@pytest.mark.parametrize(
    "command", [one for one in of("mmicl", "train") if "--plan" not in one.words], ids=str
)
def test_training_could_start(command, elsewhere, capsys):
    code, out, _ = run(capsys, *command.words[1:], "--plan")
    assert code == 0 and json.loads(out)["recommended"] is not None


@pytest.mark.parametrize("command", of("mmicl", "serve"), ids=str)
def test_server_finds_what_it_needs(command, elsewhere, capsys):
    code, out, err = run(capsys, *command.words[1:], "--check", "--serve.port", "8391")
    assert (code, json.loads(out)["passed"]) == (0, True), err


@pytest.mark.parametrize("command", of("mmicl", "doctor"), ids=str)
def test_doctor_says_what_there_is(command, elsewhere, capsys):
    code, out, err = run(capsys, *command.words[1:])
    # What is missing depends on the machine.
    assert code in (0, 2) and "llava_next" in out + err


@pytest.mark.parametrize("command", of("mmicl", "chain"), ids=str)
def test_chain_takes_its_arguments(command):
    stages, *rest = command.words[2:]
    assert set(stages.split(",")) <= set(cli.STAGES)
    assert parse_run("chain", "", rest).output


@pytest.mark.parametrize("command", of("mmicl", "submit"), ids=str)
def test_job_would_be_sent(command, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    with FakeJobServer(token="a" * 64) as server:
        words = [server.address if word.startswith("http://") else word for word in command.words]
        code, out, err = run(capsys, *words[1:], "--dry-run")
    assert (code, json.loads(out)["passed"]) == (0, True), err


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_word_of_make_is_one(command):
    done = subprocess.run(["make", "--dry-run", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", of("ray"), ids=str)
def test_ray_takes_its_arguments(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *rest = command.words[1:]
    # Reads the arguments and does nothing.
    with scripts.cli.commands[name].make_context(name, list(rest)) as read:
        assert all(
            Path(value).is_file() for key, value in read.params.items() if key == "cluster_config_file"
        )


@pytest.mark.parametrize("command", of("kubectl"), ids=str)
def test_overlay_that_is_applied_is_built_by_kubectl(command):
    if "--kustomize" not in command.words:
        pytest.skip("it looks at a cluster that runs")
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here")
    folder = command.words[command.words.index("--kustomize") + 1]
    done = subprocess.run(["kubectl", "kustomize", folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "kind: RayJob" in done.stdout, done.stderr


def test_sizes_follow_from_the_plans(elsewhere, capsys):
    table = {cells[0].strip("`"): cells[1:] for cells in rows(section("Sizing")) if "llava" in cells[0]}
    shown = [command for command in of("mmicl", "train") if command.printed]
    assert len(table) == len(shown) == 3
    for command in shown:
        _, out, _ = run(capsys, *command.words[1:])
        plan = json.loads(out)
        (peak,) = (row.pop("peak") for row in plan["states"] if row.items() >= plan["recommended"].items())
        stage, told_peak, *told = table[recipe_of(command)]
        assert (stage, told_peak) == (str(plan["recommended"]["stage"]), f"{peak / 1e9:.1f} GB")
        expected = []
        for speed in (REACHED * 1e12 * tera for tera in PEAKS):
            expected.append(GPUS * speed * plan["global_batch"] / plan["operations"])
            expected.append(plan["operations"] * plan["steps"] / speed / 3600)
        assert all(map(is_told_as, told, expected)), (told, expected)


def recipe_of(command: Command) -> str:
    return command.words[command.words.index("--recipe") + 1]


@pytest.mark.parametrize("cells", list(rows(section("Scaling to the internet"))), ids=lambda cells: cells[0])
def test_sum_is_right(cells):
    _, arithmetic, result = cells
    value = eval(arithmetic.strip("`"), {"__builtins__": {}}, {"min": min})
    assert is_told_as(result.split()[0], value), value


def test_measured_figures_name_benchmarks_that_exist():
    named = re.findall(r"`(tests/benchmarks/\w+\.py)`", README)
    assert len(named) >= 8
    for name in named:
        assert "pytest.mark.bench" in (ROOT / name).read_text(encoding="utf-8"), name


def test_figures_of_the_code_are_those_that_sums_use():
    from pipelines.catalogue import ROWS_OF_A_BUCKET
    from pipelines.parts import MOST_BLOCKS

    text = section("Scaling to the internet")
    assert f"1e9 / {ROWS_OF_A_BUCKET}" in text
    assert f"{MOST_BLOCKS:,} cores" in text


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:ray_up|kuberay|image|dashboards)/[\w./-]+)`", README)))
)
def test_path_that_is_named_exists(name):
    assert (ROOT / "cluster" / name).exists()

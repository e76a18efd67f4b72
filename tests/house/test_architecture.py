"""Who may import whom; how long a function and a file may be. Read from the syntax, nothing is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mmicl_core", "pipelines", "cluster")
LONGEST_FUNCTION = 60
LONGEST_FILE = 450

MODEL = {"mmicl_core.config", "mmicl_core.data", "mmicl_core.errors", "mmicl_core.prompts"}
# Part of the project -> the parts that it may import beside itself. The longest prefix names a part.
MAY_IMPORT = {
    "mmicl_core.errors": set(),
    "mmicl_core.shapes": set(),
    "mmicl_core.config": {"mmicl_core.errors"},
    "mmicl_core.assets": {"mmicl_core.errors"},
    "mmicl_core.prompts": {"mmicl_core.errors"},
    "mmicl_core.data": {"mmicl_core.config", "mmicl_core.errors"},
    # The only place that pads; what it packs are prompts.
    "mmicl_core.data.collate": {"mmicl_core.data", "mmicl_core.prompts", "mmicl_core.errors"},
    # Bytes and keys, no model.
    "mmicl_core.bank": {"mmicl_core.config", "mmicl_core.errors", "mmicl_core.data.files"},
    # The name of a model is the digest of its files; what it reads are packed prompts and prepared pictures.
    "mmicl_core.backbones": {
        "mmicl_core.errors",
        "mmicl_core.prompts",
        "mmicl_core.data.collate",
        "mmicl_core.data.files",
        "mmicl_core.data.pictures",
    },
    "mmicl_core.embedders": MODEL | {"mmicl_core.backbones"},
    "mmicl_core.methods": MODEL | {"mmicl_core.backbones"},
    "mmicl_core.training": MODEL | {"mmicl_core.backbones", "mmicl_core.methods"},
    "mmicl_core.evaluation": MODEL | {"mmicl_core.backbones", "mmicl_core.methods"},
    "mmicl_core.serving": MODEL | {"mmicl_core.backbones", "mmicl_core.methods"},
    "pipelines": {"mmicl_core"},
    # Where a verb hands itself over to a cluster, and where a machine is compared with one.
    "pipelines.submission": {"mmicl_core", "pipelines", "cluster"},
    "pipelines.doctor": {"mmicl_core", "pipelines", "cluster.checks", "cluster.client"},
    # Programs are commands to it; what it shares is how a mistake is told.
    "cluster": {"mmicl_core.errors"},
}
# What processes start with that compute with no model: workers that read and draw, and what is beside them.
LIGHT = ("pipelines.episodes", "pipelines.wanted", "pipelines.watch", "pipelines.submission", "pipelines.cli")
HEAVY = {"torch", "transformers", "deepspeed", "matplotlib", "ray.train", "ray.data", "pandas", "scipy"}

# Programs stand beside each other; only what arranges them imports one.
PROGRAMS = ("pipelines.train", "pipelines.evaluate", "pipelines.serve", "pipelines.quickstart")
ARRANGERS = ("pipelines.cli", "pipelines.compare", "pipelines.quickstart")

# Library -> where it may be imported.
LIBRARY_HOMES = {
    "ray": ("pipelines", "cluster"),
    "deepspeed": ("pipelines.shards", "pipelines.zero"),
    "transformers": (
        "mmicl_core.backbones",
        "mmicl_core.embedders",
        "mmicl_core.methods",
        "mmicl_core.data.embedding",
        "pipelines.zero",
    ),
    "faiss": ("mmicl_core.data.concepts",),
    "peft": ("mmicl_core.methods.lora", "mmicl_core.methods.prompt_tuning"),
    "spacy": ("mmicl_core.data.concepts",),
    "torch": ("mmicl_core", "pipelines"),
    "fastapi": ("pipelines.serve",),
    "pydantic_settings": ("pipelines.settings",),
    "resvg_py": ("mmicl_core.data.open_emoji",),
    "httpcore": ("mmicl_core.data.network",),
    "protego": ("mmicl_core.data.courtesy",),
    "imagehash": ("mmicl_core.data.look",),
    "wandb": ("pipelines.trackers",),
    "matplotlib": (
        "mmicl_core.evaluation.drawing",
        "mmicl_core.evaluation.charts",
        "mmicl_core.evaluation.page_charts",
    ),
    "scipy": ("mmicl_core.evaluation.statistics",),
    "sklearn": ("mmicl_core.evaluation.tasks.hateful_memes",),
    "nltk": ("mmicl_core.evaluation.tasks.captions",),
    "pycocoevalcap": ("mmicl_core.evaluation.tasks.captions",),
    "openai": ("mmicl_core.evaluation.endpoint",),
    "prometheus_client": ("pipelines.serve.metrics",),
    "mlflow": ("pipelines.trackers",),
}


def module_files() -> dict[str, Path]:
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = module_files()


def imports_of(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in MODULES else str(node.module)


def is_within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def part_of(module: str) -> str | None:
    return max((part for part in MAY_IMPORT if is_within(module, part)), key=len, default=None)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_lies_below_it(module):
    part = part_of(module)
    ours = {name for name in imports_of(module) if name in MODULES}
    if part is None:
        assert not ours, f"{module} belongs to no part of MAY_IMPORT and imports {sorted(ours)}"
        return
    allowed = MAY_IMPORT[part] | {part}
    wrong = sorted(name for name in ours if not any(is_within(name, below) for below in allowed))
    assert not wrong, f"{module} imports {wrong}; {part} may import {sorted(allowed)}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_is_imported_by_nothing_but_what_arranges_programs(program):
    users = {
        module
        for module in MODULES
        if not is_within(module, program) and any(is_within(name, program) for name in imports_of(module))
    }
    assert users, f"nothing imports {program}"
    assert users <= set(ARRANGERS)


@pytest.mark.parametrize("library", LIBRARY_HOMES)
def test_library_is_imported_only_where_it_belongs(library):
    homes = LIBRARY_HOMES[library]
    users = [module for module in MODULES if any(is_within(name, library) for name in imports_of(module))]
    assert users, f"nothing imports {library}: drop its line"
    strangers = [module for module in users if not any(is_within(module, home) for home in homes)]
    assert not strangers, f"{strangers} import {library}, which belongs in {homes}"


def test_no_module_imports_itself_by_a_detour():
    graph = {module: {name for name in imports_of(module) if name in MODULES} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("start", ["mmicl_core.config.run", "pipelines.cli", "pipelines.settings"])
def test_settings_and_command_line_start_without_heavy_libraries(start):
    heavy = ("torch", "ray", "transformers", "deepspeed", "pyarrow", "numpy", "fastapi", "PIL", "matplotlib")
    code = f"import sys, {start}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_environment_is_read_and_written_in_its_one_module():
    # Deepspeed chooses its accelerator on import, inside a worker that alone knows its devices.
    homes = {"pipelines.environment", "pipelines.zero"}
    users = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
    }
    assert users <= homes


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_files_stay_short(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE, f"{module} is too long: it holds two things"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines < LONGEST_FUNCTION, f"{module}.{node.name} has {lines} lines"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_test_files_stay_short(path):
    assert path.read_text(encoding="utf-8").count("\n") <= LONGEST_FILE


@pytest.mark.parametrize("module", LIGHT)
def test_process_that_computes_with_no_model_imports_none_of_its_libraries(module: str) -> None:
    looking = f"import sys, {module}; print(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", looking], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not HEAVY & set(said.stdout.split())

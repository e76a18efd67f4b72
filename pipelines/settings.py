"""The settings of a run from the command line: a recipe, and flags that override single values.

    mmicl train --recipe nano_4_aim --train.steps 200 --method.layer_norm false

Every setting of `RunConfig` is a flag, made from its type and docstring by pydantic-settings.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from mmicl_core.config.run import RunConfig, load_run
from mmicl_core.errors import ConfigError
from pipelines.arguments import Parser, find_recipe
from pipelines.trainings import trainings_of

__all__ = ["RunArguments", "parse_run"]

OUTPUT = "runs"
NONE = "none"


# Pydantic merges the two configurations, of which mypy sees the types only.
class _RunSettings(RunConfig, BaseSettings):  # type: ignore[misc]
    """`RunConfig`, in the form that pydantic-settings makes flags of."""


@dataclass(frozen=True)
class RunArguments:
    """A parsed command line."""

    run: RunConfig
    output: str
    verbose: bool
    own: Mapping[str, Any]
    """What the verb's own flags were given, by their names."""


def parse_run(
    verb: str, about: str, arguments: Sequence[str], own: Mapping[str, Mapping[str, Any]] | None = None
) -> RunArguments:
    """Read `--recipe`, `--output`, `--verbose` and one flag for each setting.

    Args:
        verb: as it is called, for help and errors.
        about: what the verb does, for help.
        arguments: what follows the verb.
        own: flags of this verb alone: their names, and what argparse shall know of them.

    Raises:
        ConfigError: a flag, a value or the recipe is wrong.
    """
    usage = f"mmicl {verb} [--recipe R] [--output DIR] [--verbose] [--SECTION.SETTING VALUE ...]"
    parser = Parser(prog=f"mmicl {verb}", usage=usage, description=about)
    parser.add_argument("--recipe", help="YAML file of a run, or the name of one that comes along")
    parser.add_argument("--output", default=OUTPUT, help="folder of results (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and its workers print")
    for flag, about_flag in (own or {}).items():
        parser.add_argument(flag, **about_flag)
    flags = ["--recipe", "--output", "--verbose", *(own or {})]

    def add_setting(group: Any, *names: str, **settings: Any) -> Any:
        flags.extend(names)
        # A recipe may say otherwise, so no default is shown; of a union it would even be a wrong one.
        settings["help"] = settings.get("help", "").partition("(default:")[0].strip()
        return group.add_argument(*names, **settings)

    source: CliSettingsSource[Any] = CliSettingsSource(
        _RunSettings,
        root_parser=parser,
        cli_parse_none_str=NONE,
        cli_avoid_json=True,
        add_argument_method=add_setting,
    )
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        hint = f"did you mean {close[0]}?" if close else f"`mmicl {verb} --help` lists them all"
        raise ConfigError(f"{unknown[0]} is not a setting; {hint}")
    try:
        overrides = source(parsed_args=known)()
    except SettingsError as error:
        reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise ConfigError(f"{reason}; `mmicl {verb} --help` says what a setting takes") from error
    recipe = None if known.recipe is None else find_recipe(known.recipe)
    values = {flag: getattr(known, flag.removeprefix("--").replace("-", "_")) for flag in own or {}}
    run = load_run(recipe, overrides)
    for model in run.evaluate.asked:
        # A mistake in what is trained last shall not wait for all that is trained before it.
        trainings_of(model)
    return RunArguments(run, known.output, known.verbose, values)

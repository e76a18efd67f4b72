"""Command-line arguments that are not settings: verbs, recipes by name, folders of results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from mmicl_core.errors import ConfigError

__all__ = ["RECIPES", "STAGES", "Parser", "find_recipe", "output_folder", "positive", "read_stages"]

RECIPES = Path(__file__).parent / "recipes"
STAGES = ("episodes", "train", "evaluate")


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one sentence instead of the list of all flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit for."""
        raise ConfigError(f"{message}; `{self.prog} --help` lists what there is")


def positive(text: str) -> int:
    """A count of one or more, as argparse reads it.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def read_stages(text: str) -> list[str]:
    """The stages of a chain, as in `episodes,train`.

    Raises:
        ConfigError: one of them is none.
    """
    stages = text.split(",")
    wrong = [stage for stage in stages if stage not in STAGES]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is no stage of a chain; these are: {', '.join(STAGES)}")
    return stages


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by its name alone for one that comes along.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.yaml"))}
    if name not in known:
        raise ConfigError(f"recipe {name} does not exist; these come along: {', '.join(known)}")
    return known[name]


def output_folder(name: str) -> Path:
    """A folder to write to, made now so that a long run does not end at a wrong path.

    Raises:
        ConfigError: it cannot be made.
    """
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {name} cannot be a folder ({error.strerror}): name another") from error
    return path

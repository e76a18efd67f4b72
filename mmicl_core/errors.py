"""Everything that this project raises on purpose.

    MmiclError
    |-- ConfigError        a run that cannot start: names the field, both values and the remedy
    |-- DataError          a corpus or data set that breaks its schema: names the file, row or column
    |-- BackboneError      a model whose parts cannot be found: what was looked for, what exists
    |-- CheckpointError    weights that do not fit: the first missing, unexpected, mismatched names
    |-- TrainingError      a run that cannot go on: which worker, in which module, why
    `-- BankError          a demonstration that the bank cannot store or verify

All of them are `ValueError`: each is something that a user, a file or a network can cause. What only
a programmer can break is an `assert`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = [
    "BackboneError",
    "BankError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MmiclError",
    "TrainingError",
    "find_mistake",
]


class MmiclError(ValueError):
    """Base of every error that a user of this project can cause and mend."""


class ConfigError(MmiclError):
    """A run that cannot start."""


class DataError(MmiclError):
    """A corpus or data set that breaks its schema."""


class BackboneError(MmiclError):
    """A multimodal model whose parts cannot be found or used."""


class CheckpointError(MmiclError):
    """Weights that do not fit the model that they are loaded into."""


class TrainingError(MmiclError):
    """A run that cannot go on."""


class BankError(MmiclError):
    """A demonstration that the bank cannot store, find or verify."""


def find_mistake(error: BaseException) -> MmiclError | None:
    """The innermost of these errors in what `error` wraps; None if it is something else all through.

    Frameworks of workers pass on what a worker raised as `cause`, or of all workers in `worker_failures`.
    """
    mistakes = [wrapped for wrapped in _wrapped(error) if isinstance(wrapped, MmiclError)]
    return mistakes[-1] if mistakes else None


def _wrapped(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
        for failure in failures.values():
            yield from _wrapped(failure)
        error = getattr(error, "cause", None) or error.__cause__

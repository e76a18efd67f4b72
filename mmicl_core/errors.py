"""Everything that this project raises on purpose.

    MmiclError
    |-- ConfigError        a run that cannot start: names the field, both values and the remedy
    |-- DataError          a corpus or data set that breaks its schema: names the file, row or column
    |-- BackboneError      a model whose parts cannot be found: what was looked for, what exists
    |-- CheckpointError    weights that do not fit: the first missing, unexpected, mismatched names
    `-- BankError          a demonstration that the bank cannot store or verify

All of them are `ValueError`: each is something that a user, a file or a network can cause. What only
a programmer can break is an `assert`.
"""

__all__ = [
    "BackboneError",
    "BankError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MmiclError",
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


class BankError(MmiclError):
    """A demonstration that the bank cannot store, find or verify."""

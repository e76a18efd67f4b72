"""What comes inside the package: the embedded corpus, backbone and aggregator."""

from __future__ import annotations

from pathlib import Path

from mmicl_core.errors import ConfigError

__all__ = ["EMBEDDED", "resolve"]

EMBEDDED = "embedded:"


def resolve(path: str) -> Path:
    """The absolute path of a folder, or of `embedded:NAME`, one inside the package.

    Workers have other working directories than the command that names a folder.

    Raises:
        ConfigError: the package has nothing of that name.
    """
    if not path.startswith(EMBEDDED):
        return Path(path).absolute()
    here = Path(__file__).parent
    folder = here / path.removeprefix(EMBEDDED)
    if not folder.is_dir():
        known = ", ".join(EMBEDDED + found.name for found in sorted(here.iterdir()) if _is_asset(found))
        raise ConfigError(f"{path} is not inside the package, which holds {known}")
    return folder


def _is_asset(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith("_")

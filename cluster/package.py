"""What travels: the files of a checkout that a job needs, and the archive that they are sent in.

The archive becomes the job's working directory, so the cluster runs what lies here, committed or not. It
is made here and not by Ray, so that what is shown and judged beforehand is what is sent, byte for byte.
Files that `.gitignore` or `.rayignore` name stay behind, as Ray itself would have it, and so do history,
environments, caches, results, weights and data.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pathspec import GitIgnoreSpec

from mmicl_core.errors import ConfigError

__all__ = ["EXCLUDES", "Package", "checkout", "gather", "inside"]

WEIGHTS = ("safetensors", "bin", "pt", "pth", "ckpt", "gguf", "onnx", "npy", "npz", "h5")
DATA = ("tar", "tar.gz", "tgz", "zip", "whl", "parquet", "arrow", "feather", "lance")
EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    ".*cache",
    ".hypothesis",
    "__pycache__",
    "*.pyc",
    "*.egg-info",
    "*.log",
    "/build/",
    "/dist/",
    "/runs/",
    "/tests/",
    "/data/",
    "/models/",
    "/checkpoints/",
    "/mlruns/",
    "/wandb/",
    *(f"*.{ending}" for ending in WEIGHTS + DATA),
    # The corpus and the models that come along with the code.
    "!/mmicl_core/assets/**",
)
IGNORE_FILES = (".gitignore", ".rayignore")
# What a zip file takes beside the bytes of a file: two headers, each with its name; and one end.
HEADER_BYTES = 30 + 46
END_BYTES = 22
# One date for all, so that unchanged files make the same archive, which Ray then has already.
DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """Files of a folder, by their paths from it in the order of their names, with their sizes."""

    root: Path
    sizes: dict[str, int]
    links: tuple[str, ...]
    """Links that lead out of the folder, or to folders; they stay behind."""

    @cached_property
    def total_bytes(self) -> int:
        """The size of the archive."""
        names = sum(2 * len(name.encode()) for name in self.sizes)
        return sum(self.sizes.values()) + names + HEADER_BYTES * len(self.sizes) + END_BYTES

    def largest(self, most: int) -> list[tuple[str, int]]:
        """The largest files, with their sizes."""
        return sorted(self.sizes.items(), key=lambda file: (-file[1], file[0]))[:most]

    def holds(self, path: str) -> bool:
        """Whether a file, a folder or a glob travels."""
        plain = path.removeprefix("./").rstrip("/")
        fits = GitIgnoreSpec.from_lines([f"/{plain}"]).match_file
        return any(fits(name) for name in self.sizes)

    def write(self, target: Path) -> None:
        """Make the archive, without compressing it: pictures and weights would not shrink."""
        with zipfile.ZipFile(target, "w") as archive:
            for name, size in self.sizes.items():
                source = self.root / name
                entry = zipfile.ZipInfo(name, DATE)
                entry.file_size = size
                entry.external_attr = source.stat().st_mode << 16
                with source.open("rb") as reader, archive.open(entry, "w") as writer:
                    shutil.copyfileobj(reader, writer)


def checkout() -> Path:
    """The folder that is packaged.

    Raises:
        ConfigError: these packages were installed, and there is no checkout.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        raise ConfigError(f"{root} is not a checkout: submit from a clone of the repository")
    return root


def inside(root: Path, file: Path) -> str:
    """The path of a file from `root`, as the job will find it.

    Raises:
        ConfigError: it lies elsewhere.
    """
    path = file.resolve()
    if not path.is_relative_to(root):
        raise ConfigError(
            f"{file} lies outside the checkout {root}, which is all that a job sees: copy it there"
        )
    return str(path.relative_to(root))


def gather(root: Path) -> Package:
    """Look at all of a folder, and leave out what stays behind."""
    sizes: dict[str, int] = {}
    links: list[str] = []
    for path in _walk(root, [_Rules(root, EXCLUDES)]):
        name = path.relative_to(root).as_posix()
        # A link may lead to what nobody wants to send, or round in a circle.
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            links.append(name)
        elif path.is_file():
            sizes[name] = path.stat().st_size
    return Package(root, dict(sorted(sizes.items())), tuple(sorted(links)))


class _Rules:
    """What an ignore file says of the folder that it lies in."""

    def __init__(self, folder: Path, lines: Sequence[str]) -> None:
        self._folder = folder
        self._spec = GitIgnoreSpec.from_lines(lines)

    def leave_out(self, path: Path, *, is_folder: bool) -> bool:
        name = path.relative_to(self._folder).as_posix()
        return self._spec.match_file(f"{name}/" if is_folder else name)


def _walk(folder: Path, rules: list[_Rules]) -> Iterator[Path]:
    here = [
        _Rules(folder, (folder / name).read_text(encoding="utf-8", errors="replace").splitlines())
        for name in IGNORE_FILES
        if (folder / name).is_file()
    ]
    for path in folder.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if any(rule.leave_out(path, is_folder=is_folder) for rule in rules + here):
            continue
        if is_folder:
            yield from _walk(path, rules + here)
        else:
            yield path

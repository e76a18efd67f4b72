"""Secrets among the files that would travel: whoever may read a job's files would have them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

from cluster.package import Package

__all__ = ["find_secrets"]

NAMES = GitIgnoreSpec.from_lines(
    [
        ".env*",
        "*.pem",
        "*.key",
        "*.p12",
        "*.pfx",
        "id_rsa",
        "id_dsa",
        "id_ecdsa",
        "id_ed25519",
        ".aws/",
        ".ssh/",
        ".netrc",
        ".pypirc",
        ".git-credentials",
    ]
)
# What it is -> what it begins with, which is found at once, and what it looks like.
TOKENS = {
    "an AWS access key": (b"AKIA", rb"\bAKIA[0-9A-Z]{16}\b"),
    "a passing AWS access key": (b"ASIA", rb"\bASIA[0-9A-Z]{16}\b"),
    "a Hugging Face token": (b"hf_", rb"\bhf_[A-Za-z0-9]{30,}"),
    "a GitHub token": (b"gh", rb"\bgh[pousr]_[A-Za-z0-9]{36}"),
    "a fine-grained GitHub token": (b"github_pat_", rb"\bgithub_pat_[A-Za-z0-9_]{50,}"),
    "a Google API key": (b"AIza", rb"\bAIza[0-9A-Za-z_-]{35}"),
    "an OpenAI key": (b"sk-", rb"\bsk-(?:proj-)?[A-Za-z0-9_-]{40,}"),
    # As `mmicl serve keys add` makes them.
    "an API key of mmicl serve": (b"mmicl-", rb"\bmmicl-[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"),
    "a private key": (b"-----BEGIN", rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    # Placeholders of examples have no digit.
    "a token of a Ray cluster": (
        b"RAY_AUTH_TOKEN",
        rb"RAY_AUTH_TOKEN[\"']?\s*[=:]\s*[\"']?(?=[A-Za-z_.-]*\d)[A-Za-z0-9_.-]{16,}",
    ),
}
PATTERNS = {kind: (start, re.compile(pattern)) for kind, (start, pattern) in TOKENS.items()}
# Nobody writes a key into a larger one, and reading it would take long.
LARGEST_BYTES = 2**20


def find_secrets(package: Package) -> list[str]:
    """One sentence for each file that looks like a secret or holds one; none tells the secret itself."""
    return list(_look(package))


def _look(package: Package) -> Iterator[str]:
    for name, size in package.sizes.items():
        if NAMES.match_file(name):
            yield f"{name} is called as files of secrets are, and would travel: {_remedy(name)}"
        elif size <= LARGEST_BYTES and (found := _read(package.root / name)) is not None:
            line, kind = found
            yield f"{name}:{line} looks like {kind}, and would travel: {_remedy(name)}"


def _remedy(name: str) -> str:
    return f"name it in .rayignore (`echo /{name} >> .rayignore`), or take the secret out of the checkout"


def _read(path: Path) -> tuple[int, str] | None:
    text = path.read_bytes()
    if b"\0" in text:
        return None
    for kind, (start, pattern) in PATTERNS.items():
        match = pattern.search(text) if start in text else None
        if match is not None:
            return text.count(b"\n", 0, match.start()) + 1, kind
    return None

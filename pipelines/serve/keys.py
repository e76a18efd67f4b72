"""API keys: made, listed and removed by `mmicl serve keys`, looked up by the server.

A file has a line of JSON for each key: its name, a salt, the SHA-256 of salt and key, and when it was made.
The key itself is printed once and stored nowhere. It has 256 random bits, so nobody finds it by trying,
however fast the digest is: a slow one protects what people think up, and would only slow down every request.

The name is the tenant, whom packs belong to and limits count for. The server reads the file again when it
changes, so that a removed key is refused at the next request.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmicl_core.data.files import write_atomic
from mmicl_core.errors import ConfigError
from pipelines.serve.errors import UnknownKeyError

__all__ = ["PUBLIC", "KeyEntry", "Keys", "add_key", "list_keys", "remove_key"]

log = logging.getLogger("ray.serve")

PUBLIC = "public"
"""The tenant of everybody, where there are no keys."""
PREFIX = "mmicl-"
RANDOM_BYTES = 32
LONGEST_KEY = 128
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
OWNER_ONLY = 0o600


@dataclass(frozen=True)
class KeyEntry:
    """A key, without itself."""

    name: str
    salt: str
    hash: str
    created: int
    """Seconds since 1970."""

    def is_of(self, key: str) -> bool:
        """Whether `key` is this one; takes as long for any other."""
        return hmac.compare_digest(self.hash, _hash(self.salt, key))


class Keys:
    """Whose key a request brings.

    Args:
        path: the file of keys; None lets everybody in, as one tenant.

    Raises:
        ConfigError: the file is missing or damaged.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: Sequence[KeyEntry] = ()
        self._seen: tuple[int, ...] | None = None
        if path is not None:
            self._seen = _version(path)
            self._entries = _read(path)
            if not self._entries:
                log.warning("%s holds no key, so that nobody is let in: `mmicl serve keys add`", path)

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self._path is not None

    def tenant_of(self, authorization: str | None) -> str:
        """The tenant that an `Authorization` header speaks for.

        Raises:
            UnknownKeyError: it brings no key, or one that is not known.
        """
        if self._path is None:
            return PUBLIC
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise UnknownKeyError("the request brings no API key: send it as `Authorization: Bearer KEY`")
        self._read_again_if_changed(self._path)
        # All entries are compared, so that the time does not tell which one came near. Keys are far shorter
        # than the longest one, so that what is cut off is no key either way.
        found = [entry.name for entry in self._entries if entry.is_of(key[:LONGEST_KEY])]
        if not found:
            raise UnknownKeyError("the API key is not known here: it is mistyped, or was removed")
        return found[0]

    def _read_again_if_changed(self, path: Path) -> None:
        try:
            version: tuple[int, ...] | None = _version(path)
        except ConfigError:
            version = None
        if version == self._seen:
            return
        self._seen = version
        try:
            self._entries = _read(path)
        except ConfigError as error:
            log.error("the keys read before stay valid: %s", error)
        else:
            log.info("%s has changed and holds %d keys", path, len(self._entries))


def add_key(path: Path, name: str) -> str:
    """Make a key and add it to the file, which may not exist yet; the key is told this once.

    Raises:
        ConfigError: the name is taken or none, or the file is damaged.
    """
    if NAME.fullmatch(name) is None or name == PUBLIC:
        raise ConfigError(
            f"{name!r} cannot name a key: use up to 64 letters, digits, dots, dashes and underscores, "
            f"other than {PUBLIC!r}"
        )
    with _alone(path):
        entries = _read(path) if path.exists() else []
        # Tenants are folders of the bank, and some file systems do not tell A from a.
        if name.lower() in [entry.name.lower() for entry in entries]:
            raise ConfigError(f"{path} has a key named {name!r}: remove it, or choose another name")
        key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
        salt = secrets.token_hex(16)
        _write(path, [*entries, KeyEntry(name, salt, _hash(salt, key), int(time.time()))])
    return key


def list_keys(path: Path) -> list[KeyEntry]:
    """The keys of a file, oldest first.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    return _read(path)


def remove_key(path: Path, name: str) -> None:
    """Remove a key; servers refuse it from their next request on.

    Raises:
        ConfigError: no key has this name, or the file is missing or damaged.
    """
    with _alone(path):
        entries = _read(path)
        kept = [entry for entry in entries if entry.name != name]
        if len(kept) == len(entries):
            names = ", ".join(entry.name for entry in entries) or "none"
            raise ConfigError(f"{path} has no key named {name!r}; there are: {names}")
        _write(path, kept)


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt}{key}".encode("utf-8", "surrogatepass")).hexdigest()


def _version(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"the file of keys {path} cannot be read: {error.strerror}") from error
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read(path: Path) -> list[KeyEntry]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the file of keys {path} cannot be read ({error}): make one with "
            f"`mmicl serve keys add NAME --file {path}`"
        ) from error
    entries = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    names = [entry.name.lower() for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path} has more than one key named {twice[0]!r}: leave one of them")
    return entries


def _parse(line: str, where: str) -> KeyEntry:
    try:
        found: Any = json.loads(line)
        entry = KeyEntry(**found)
        texts = (entry.name, entry.salt, entry.hash)
        whole = all(isinstance(text, str) for text in texts) and isinstance(entry.created, int)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where} is no key ({type(error).__name__}): add it anew") from error
    if not whole or NAME.fullmatch(entry.name) is None or DIGEST.fullmatch(entry.hash) is None:
        raise ConfigError(f"{where} is no key (a field is of another form): add it anew")
    return entry


def _write(path: Path, entries: Sequence[KeyEntry]) -> None:
    lines = "".join(f"{json.dumps(asdict(entry))}\n" for entry in entries)
    write_atomic(path, lines, mode=OWNER_ONLY)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two commands at a time would lose a key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)

"""The base of all settings: frozen, strict about keys, named by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mmicl_core.errors import ConfigError

__all__ = ["Config", "explain", "fingerprint"]


class Config(BaseModel):
    """A section of settings. Unknown keys are refused and nothing changes after loading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


def fingerprint(*parts: Any) -> str:
    """Twelve hex digits that name whatever `parts` produce; equal settings give equal names."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def explain(error: ValidationError, where: str) -> ConfigError:
    """One sentence for each wrong setting: the field, the value found and what is allowed."""
    sentences = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"]) or "the run"
        if problem["type"] == "extra_forbidden":
            sentences.append(f"{where}: {field} is not a setting; `mmicl config schema` lists them all")
            continue
        message = problem["msg"].removeprefix("Value error, ")
        found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
        sentences.append(f"{where}: {field}: {message}{found}")
    return ConfigError("\n".join(sentences))

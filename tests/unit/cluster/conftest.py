from __future__ import annotations

import pytest


@pytest.fixture
def no_token(monkeypatch, tmp_path_factory) -> None:
    """Nobody's token is here, whoever runs the tests."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))

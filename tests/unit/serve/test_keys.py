from __future__ import annotations

import hashlib
import json
import logging
import stat

import pytest

from mmicl_core.errors import ConfigError
from pipelines.serve import keys as module
from pipelines.serve.errors import UnknownKeyError
from pipelines.serve.keys import Keys, add_key, list_keys, remove_key


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys" / "keys.jsonl"


def test_key_lets_its_tenant_in_and_no_other(file):
    anna, ben = add_key(file, "anna"), add_key(file, "ben")
    keys = Keys(file)
    assert keys.tenant_of(f"Bearer {anna}") == "anna"
    assert keys.tenant_of(f"bearer  {ben} ") == "ben"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer x{key}",
        "Bearer {upper}",
        "Bearer {hash}",
        "Bearer \ud800",
        "Bearer mmicl-",
    ],
)
def test_any_other_header_is_refused_and_the_error_does_not_repeat_it(file, header):
    key = add_key(file, "anna")
    (entry,) = list_keys(file)
    with pytest.raises(UnknownKeyError, match="API key") as refused:
        Keys(file).tenant_of(header and header.format(key=key, upper=key.upper(), hash=entry.hash))
    assert key not in str(refused.value)


def test_key_followed_by_very_much_is_another_key(file):
    key = add_key(file, "anna")
    with pytest.raises(UnknownKeyError):
        Keys(file).tenant_of(f"Bearer {key}{'x' * 10**6}")


def test_without_a_file_everybody_is_one_tenant():
    keys = Keys(None)
    assert (keys.required, keys.tenant_of(None), keys.tenant_of("Bearer any")) == (False, "public", "public")


def test_file_holds_no_key_and_only_its_owner_reads_it(file):
    made = [add_key(file, name) for name in ("anna", "ben")]
    text = file.read_text()
    assert not any(key in text or key.removeprefix("mmicl-") in text for key in made)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    first, second = (json.loads(line) for line in text.splitlines())
    assert first["hash"] == hashlib.sha256((first["salt"] + made[0]).encode()).hexdigest()
    assert first["salt"] != second["salt"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_keys_have_256_random_bits(file):
    made = {add_key(file, f"name{number}") for number in range(20)}
    assert len(made) == 20
    # 43 letters of base64 are 256 bits.
    assert all(key.startswith("mmicl-") and len(key) == 6 + 43 for key in made)


def test_every_entry_is_compared_whichever_one_it_is(file, monkeypatch):
    made = [add_key(file, name) for name in ("anna", "ben", "cleo")]
    keys = Keys(file)
    compared = []
    really = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append(a) or really(a, b))
    for key in made:
        keys.tenant_of(f"Bearer {key}")
    with pytest.raises(UnknownKeyError):
        keys.tenant_of("Bearer none")
    assert len(compared) == 3 * 4


def test_removed_key_is_refused_and_an_added_one_taken_without_a_restart(file):
    anna, ben = add_key(file, "anna"), add_key(file, "ben")
    keys = Keys(file)
    remove_key(file, "anna")
    with pytest.raises(UnknownKeyError, match="removed"):
        keys.tenant_of(f"Bearer {anna}")
    assert keys.tenant_of(f"Bearer {ben}") == "ben"
    cleo = add_key(file, "cleo")
    assert keys.tenant_of(f"Bearer {cleo}") == "cleo"


def test_last_key_can_be_removed_and_then_nobody_is_let_in(file):
    anna = add_key(file, "anna")
    keys = Keys(file)
    remove_key(file, "anna")
    with pytest.raises(UnknownKeyError):
        keys.tenant_of(f"Bearer {anna}")
    with pytest.raises(UnknownKeyError):
        Keys(file).tenant_of(f"Bearer {anna}")


@pytest.mark.parametrize("damage", ["missing", "garbage", "half"])
def test_file_that_breaks_while_the_server_runs_leaves_the_keys_as_they_were(file, caplog, damage):
    anna = add_key(file, "anna")
    keys = Keys(file)
    whole = file.read_text()
    if damage == "missing":
        file.unlink()
    else:
        file.write_text({"garbage": "???", "half": whole[:-20]}[damage])
    with caplog.at_level(logging.ERROR, "ray.serve"):
        assert [keys.tenant_of(f"Bearer {anna}") for _ in range(3)] == ["anna"] * 3
    assert [record.getMessage()[:32] for record in caplog.records] == ["the keys read before stay valid:"]
    file.write_text("")
    with pytest.raises(UnknownKeyError):
        keys.tenant_of(f"Bearer {anna}")


@pytest.mark.parametrize(
    "content",
    [
        "???",
        "[]",
        "{}",
        '{"name": "anna", "salt": "s", "hash": "abc", "created": 1}',
        '{"name": "../etc", "salt": "s", "hash": "HASH", "created": 1}',
        '{"name": 1, "salt": "s", "hash": "HASH", "created": 1}',
        '{"name": "anna", "salt": "s", "hash": "HASH", "created": "today"}',
        '{"name": "anna", "salt": "s", "hash": "HASH", "created": 1, "admin": true}',
    ],
)
def test_damaged_file_is_an_error_of_configuration_that_names_the_line(tmp_path, content):
    file = tmp_path / "keys.jsonl"
    file.write_text("\n" + content.replace("HASH", "0" * 64))
    with pytest.raises(ConfigError, match=r"keys\.jsonl, line 2 is no key"):
        Keys(file)


def test_bytes_that_are_no_text_are_an_error_of_configuration(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(tmp_path / "keys")


def test_missing_file_is_an_error_of_configuration_that_says_how_to_make_one(file):
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(file)
    with pytest.raises(ConfigError, match="mmicl serve keys add NAME --file"):
        list_keys(file)


def test_two_keys_of_one_name_are_refused_in_a_file(file):
    add_key(file, "anna")
    file.write_text(file.read_text() * 2)
    with pytest.raises(ConfigError, match="more than one key named 'anna'"):
        Keys(file)


@pytest.mark.parametrize("name", ["", "-x", "..", "a/b", "a b", "a\n", "\u00e4", "a" * 65, "public"])
def test_name_that_cannot_be_a_tenant_is_refused(file, name):
    with pytest.raises(ConfigError, match="cannot name a key"):
        add_key(file, name)
    assert not file.exists()


@pytest.mark.parametrize("name", ["anna", "ANNA"])
def test_taken_name_is_refused_however_it_is_written(file, name):
    anna = add_key(file, "anna")
    with pytest.raises(ConfigError, match="has a key named"):
        add_key(file, name)
    assert Keys(file).tenant_of(f"Bearer {anna}") == "anna"


def test_removing_an_unknown_name_says_which_there_are(file):
    add_key(file, "anna")
    with pytest.raises(ConfigError, match="no key named 'ben'; there are: anna"):
        remove_key(file, "ben")


def test_list_tells_names_in_the_order_in_which_they_were_added(file):
    for name in ("cleo", "anna"):
        add_key(file, name)
    assert [entry.name for entry in list_keys(file)] == ["cleo", "anna"]

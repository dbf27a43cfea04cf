"""API keys: what is stored of them, how the file is reloaded, and the command that manages them."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.serve.http.api_keys import ApiKeys, new_key, parse_keys, read_keys, revoke_key, sha256_of
from engine.serve.http.middleware import access_options, is_loopback
from jobs.manta import main


def test_only_the_hash_of_a_secret_is_stored(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret, key = new_key(file, "alice", 60, None, 90)
    assert len(secret) == len("sk-manta-") + 43  # 256 bits in base64
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file) == [key]
    assert (key.requests_per_minute, key.tokens_per_minute) == (60, None)
    assert key.expires == pytest.approx(time.time() + 90 * 86400, abs=10)
    assert ApiKeys(file).find(secret, time.time()) == key
    assert ApiKeys(file).find(secret + "x", time.time()) is None
    assert ApiKeys(None, file.read_text()).find(secret, time.time()) == key


def test_a_name_is_unique_among_active_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first, _ = new_key(file, "alice", None, None, None)
    with pytest.raises(UserError, match="there is a key 'alice' already"):
        new_key(file, "alice", None, None, None)
    with pytest.raises(UserError, match="did you mean 'alice'"):
        revoke_key(file, "alive")
    with pytest.raises(UserError, match="cannot name a key"):
        new_key(file, "a b", None, None, None)
    revoke_key(file, "alice")
    second, _ = new_key(file, "alice", None, None, None)
    keys, now = ApiKeys(file), time.time()
    assert [key.state(now) for key in (keys.find(first, now), keys.find(second, now)) if key] == ["revoked", "active"]


def test_changes_of_the_file_are_loaded_and_its_loss_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.serve.http.api_keys.RELOAD_EVERY_S", 0.0)
    file = tmp_path / "keys.json"
    keys = ApiKeys(file)
    assert not keys.required
    secret, _ = new_key(file, "alice", None, None, None)
    stored_key = keys.find(secret, time.time())
    assert stored_key
    assert keys.required
    revoke_key(file, "alice")
    stored_key = keys.find(secret, time.time())
    assert stored_key
    assert stored_key.state(time.time()) == "revoked"
    content = file.read_text()
    file.write_text(content[:-5])  # being edited
    assert keys.find(secret, time.time()) == stored_key
    file.unlink()
    assert keys.find(secret, time.time()) is None
    assert keys.required


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"keys": [{"name": "a"}]}',
        '{"keys": [{"name": "a", "sha256": "12", "created": 0}]}',
        json.dumps({"keys": [{"name": "a b", "sha256": sha256_of("x"), "created": 0}]}),
        json.dumps({"keys": [{"name": "a", "sha256": sha256_of("x"), "created": 0, "expires": "soon"}]}),
        json.dumps({"keys": [{"name": "a", "sha256": sha256_of("x"), "created": 0, "color": "red"}]}),
    ],
)
def test_malformed_key_files_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="MANTA_KEYS holds no keys"):
        parse_keys(text, "MANTA_KEYS")


def test_a_network_address_requires_keys(tiny: Config, tmp_path: Path) -> None:
    def config(**values: object) -> Config:
        return with_values(
            tiny, {"runs_dir": str(tmp_path), **{f"serve.{name}": value for name, value in values.items()}}
        )

    assert not access_options(config(), "").origins
    with pytest.raises(UserError, match=r"serve.host=0.0.0.0 is open to the network and there are no keys"):
        access_options(config(host="0.0.0.0"), "")
    assert access_options(config(host="0.0.0.0", open=True), "")
    new_key(config().keys_file, "alice", None, None, None)
    assert access_options(config(host="0.0.0.0"), "")
    text = config().keys_file.read_text()
    assert access_options(config(host="0.0.0.0", keys_file=str(tmp_path / "none.json")), text).keys_text == text
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "::", "10.0.0.1", "here.example")] == [True] * 4 + [False] * 3  # fmt: skip


def test_the_command_creates_lists_and_revokes_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["key"]) == 0
    assert "no key" in capsys.readouterr().out
    assert main(["key", "new", "name=alice", "key.requests_per_minute=60", "key.days=30"]) == 0
    secret = capsys.readouterr().out.strip()
    assert main(["key", "new", "name=alice"]) == 2
    assert "already" in capsys.readouterr().err
    assert main(["key", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in ("alice", "active", "60", "any"))
    assert secret not in listed
    assert main(["key", "revoke", "alice"]) == 0
    keys = read_keys(tmp_path / "runs" / "keys.json")
    assert [(key.sha256, key.state(time.time())) for key in keys] == [(sha256_of(secret), "revoked")]
    assert main(["key", "renew"]) == 2
    for folder, _, names in os.walk(tmp_path):
        assert not any(secret in Path(folder, name).read_text() for name in names)

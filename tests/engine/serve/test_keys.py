"""Keys: what is kept of them, who is let in, and what each may ask in a minute."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.serve.http.api_keys import Key, Keys, digest_of, new_key, parsed, read_keys, revoke_key
from engine.serve.http.middleware import access_for, is_loopback
from engine.serve.http.rate_limits import Limits
from jobs.manta import main


def test_only_the_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret, key = new_key(file, "alice", 60, None, 90)
    assert len(secret) == len("sk-manta-") + 43  # 256 bits in base64
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file) == [key]
    assert (key.requests_per_minute, key.tokens_per_minute) == (60, None)
    assert key.expires == pytest.approx(time.time() + 90 * 86400, abs=10)
    assert Keys(file).find(secret, time.time()) == key
    assert Keys(file).find(secret + "x", time.time()) is None
    assert Keys(None, file.read_text()).find(secret, time.time()) == key


def test_names_are_one_keys_each_until_it_is_revoked(tmp_path: Path) -> None:
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
    keys, now = Keys(file), time.time()
    assert [key.state(now) for key in (keys.find(first, now), keys.find(second, now)) if key] == ["revoked", "active"]


def test_a_running_endpoint_takes_up_changes_and_stays_shut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.serve.http.api_keys.LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys.json"
    keys = Keys(file)
    assert not keys.required
    secret, _ = new_key(file, "alice", None, None, None)
    found = keys.find(secret, time.time())
    assert found
    assert keys.required
    revoke_key(file, "alice")
    found = keys.find(secret, time.time())
    assert found
    assert found.state(time.time()) == "revoked"
    kept = file.read_text()
    file.write_text(kept[:-5])  # half written by somebody
    assert keys.find(secret, time.time()) == found
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
        json.dumps({"keys": [{"name": "a b", "sha256": digest_of("x"), "created": 0}]}),
        json.dumps({"keys": [{"name": "a", "sha256": digest_of("x"), "created": 0, "expires": "soon"}]}),
        json.dumps({"keys": [{"name": "a", "sha256": digest_of("x"), "created": 0, "colour": "red"}]}),
    ],
)
def test_what_holds_no_keys_is_told(text: str) -> None:
    with pytest.raises(UserError, match="MANTA_KEYS holds no keys"):
        parsed(text, "MANTA_KEYS")


def test_a_network_address_needs_keys(tiny: Config, tmp_path: Path) -> None:
    def config(**values: object) -> Config:
        return with_values(
            tiny, {"runs_dir": str(tmp_path), **{f"serve.{name}": value for name, value in values.items()}}
        )

    assert not access_for(config(), "").origins
    with pytest.raises(UserError, match=r"serve.host=0.0.0.0 is open to the network and there are no keys"):
        access_for(config(host="0.0.0.0"), "")
    assert access_for(config(host="0.0.0.0", open=True), "")
    new_key(config().keys_file, "alice", None, None, None)
    assert access_for(config(host="0.0.0.0"), "")
    text = config().keys_file.read_text()
    assert access_for(config(host="0.0.0.0", keys_file=str(tmp_path / "none.json")), text).keys_text == text
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost", "::", "10.0.0.1", "here.example")] == [True] * 4 + [False] * 3  # fmt: skip


def test_the_command_makes_lists_and_revokes(
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
    assert [(key.sha256, key.state(time.time())) for key in keys] == [(digest_of(secret), "revoked")]
    assert main(["key", "renew"]) == 2
    for folder, _, names in os.walk(tmp_path):
        assert not any(secret in Path(folder, name).read_text() for name in names)


def key(requests: int | None = None, tokens: int | None = None) -> Key:
    return Key("alice", digest_of("x"), 0.0, requests, tokens)


def test_requests_are_let_in_as_the_minute_goes() -> None:
    limits, alice = Limits(), key(requests=6)
    assert [limits.request(alice, 0.0) for _ in range(7)] == [0.0] * 6 + [10.0]
    assert limits.request(alice, 9.0) == pytest.approx(1.0)
    assert limits.request(alice, 10.0) == 0
    assert limits.request(alice, 1000.0) == 0  # a minute's worth at most is saved up
    assert [limits.request(alice, 1000.0) > 0 for _ in range(6)] == [False] * 5 + [True]
    assert limits.request(key(), 0.0) == 0


def test_tokens_are_charged_ahead_and_settled() -> None:
    limits, alice = Limits(), key(tokens=600)
    assert limits.reserve(alice, 500, 0.0) == 0
    assert limits.reserve(alice, 200, 0.0) == pytest.approx(10.0)
    limits.settle(alice, 500, 100)
    assert limits.reserve(alice, 500, 0.0) == 0
    limits.settle(alice, 500, 620)  # more than was thought: a debt
    assert limits.reserve(alice, 1, 0.0) == pytest.approx((1 + 120) / 10)
    assert limits.reserve(alice, 5000, 60.0) == pytest.approx(12.0)  # over a minute's worth: a full bucket will do
    assert limits.reserve(alice, 5000, 72.0) == 0
    assert limits.reserve(alice, 1, 72.0) == pytest.approx((5000 - 600 + 1) / 10)

"""The doctor's rows on a machine that runs these tests, and its advice where something is wrong."""

import re
import socket

from cluster import doctor


def test_rows(monkeypatch, tmp_path):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    rows = {f.what: f for f in doctor.examine()}
    assert {"Python", "g++", "ninja", "packages", "shared memory", "memory", "GPUs", "port 8000", "clock"} <= set(rows)
    assert rows["Python"].verdict == rows["packages"].verdict == "ok"
    assert re.fullmatch(r"\d+ in their ranges", rows["packages"].found)
    assert all(f.advice for f in rows.values() if f.verdict != "ok")


def test_a_held_port_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", 8000))
            s.listen()
        except OSError:
            pass  # held by another already: as good
        row = next(f for f in doctor.ports() if f.what == "port 8000")
    assert row.verdict == "warn"
    assert "pid" in row.found
    assert "serve.port=8001" in row.advice


def test_wrong_versions_fail(monkeypatch):
    monkeypatch.setattr(doctor, "declared", lambda: ["rich>=99", "no-such-package>=1", "psutil>=1"])
    (row,) = doctor.packages()
    assert row.verdict == "fail"
    assert re.match(r"rich [\d.]+ is not >=99; no-such-package is missing$", row.found)

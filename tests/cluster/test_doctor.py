"""The doctor's rows on a machine that runs these tests, and its advice where something is wrong."""

import re
import socket

from cluster import doctor


def test_rows(monkeypatch, tmp_path):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    rows = {f.check: f for f in doctor.run_checks()}
    assert {"Python", "g++", "ninja", "packages", "shared memory", "memory", "GPUs", "port 8000", "clock"} <= set(rows)
    assert rows["Python"].status == rows["packages"].status == "ok"
    assert re.fullmatch(r"\d+ in their ranges", rows["packages"].found)
    assert all(f.advice for f in rows.values() if f.status != "ok")


def test_a_held_port_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", 8000))
            s.listen()
        except OSError:
            pass  # held by another already: as good
        row = next(f for f in doctor.check_ports() if f.check == "port 8000")
    assert row.status == "warn"
    assert "pid" in row.found
    assert "serve.port=8001" in row.advice


def test_wrong_versions_fail(monkeypatch):
    monkeypatch.setattr(doctor, "declared_requirements", lambda: ["rich>=99", "no-such-package>=1", "psutil>=1"])
    (row,) = doctor.check_packages()
    assert row.status == "fail"
    assert re.match(r"rich [\d.]+ is not >=99; no-such-package is missing$", row.found)

"""The access log, appended to and rotated by several processes."""

from __future__ import annotations

import logging
from pathlib import Path

from engine.serve.http.access_log import AccessLog


def test_no_line_is_lost_when_two_processes_rotate(tmp_path: Path) -> None:
    logs = [logging.Logger(str(i)) for i in range(2)]
    for log in logs:
        log.addHandler(AccessLog(str(tmp_path / "access.jsonl"), max_bytes=1000))
    for number in range(60):
        logs[number % 3 == 0].info(f"{number:050}")
    for log in logs:
        log.handlers[0].close()
    files = sorted(tmp_path.glob("access.jsonl*"))
    assert len(files) == 4  # 60 lines of 51 bytes
    assert all(file.stat().st_size < 1000 for file in files)
    lines = [int(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(lines) == list(range(60))

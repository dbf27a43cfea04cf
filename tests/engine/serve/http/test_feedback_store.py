"""Feedback records are on disk once they are acknowledged, even if the process is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine.serve.http.feedback_store import RecordWriter, read_records

WRITER = """
import asyncio, sys
from datetime import UTC, datetime
from pathlib import Path
from engine.serve.http.feedback_store import RecordWriter

async def write_record(writer, i):
    await writer.write({"request": f"r{i}", "time": datetime.now(UTC), "text": "x" * (i % 50), "rating": 1})
    print(f"r{i}", flush=True)

async def main():
    writer = RecordWriter(Path(sys.argv[1]), "feedback")
    for start in range(0, 100000, 8):
        await asyncio.gather(*(write_record(writer, i) for i in range(start, start + 8)))

asyncio.run(main())
"""


def record(name: str, **more: Any) -> dict[str, Any]:
    return {"request": name, "time": datetime.now(UTC), "model": "m", "version": "v", "key": ""} | more


def test_records_are_read_in_order(tmp_path: Path) -> None:
    async def write() -> None:
        feedback, requests = RecordWriter(tmp_path, "feedback"), RecordWriter(tmp_path, "requests")
        for i in range(5):
            await feedback.write(record(f"r{i}", rating=-1, label="bug"))
        await requests.write(record("r0", path="/v1/classify", input='{"input": "é"}', output="[]", seconds=0.5))

    asyncio.run(write())
    asyncio.run(write())  # a second file, as of another process
    stored = read_records(tmp_path, "feedback")
    assert stored["request"].to_pylist() == [f"r{i}" for i in range(5)] * 2
    assert set(stored["rating"].to_pylist()) == {-1}
    assert stored["comment"].null_count == 10
    assert read_records(tmp_path, "requests")["input"].to_pylist() == ['{"input": "é"}'] * 2
    assert len(list(tmp_path.glob("feedback-*.arrows"))) == 2
    assert read_records(tmp_path / "none", "requests").num_rows == 0


def test_acknowledged_records_survive_a_kill(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        acknowledged = [process.stdout.readline().strip() for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.read().split()
    stored = read_records(tmp_path, "feedback")["request"].to_pylist()
    assert set(acknowledged) <= set(stored)
    assert len(stored) == len(set(stored))


def test_a_torn_end_loses_that_record_only(tmp_path: Path) -> None:
    async def write() -> None:
        writer = RecordWriter(tmp_path, "feedback")
        for i in range(3):
            await writer.write(record(f"r{i}", text="word " * 50))

    asyncio.run(write())
    (file,) = tmp_path.glob("*.arrows")
    content = file.read_bytes()
    for cut in (1, 100, 300):
        file.write_bytes(content[:-cut])
        assert read_records(tmp_path, "feedback")["request"].to_pylist() == ["r0", "r1"]
    file.write_bytes(content[:10])
    assert read_records(tmp_path, "feedback").num_rows == 0


def test_a_full_disk_is_reported_and_later_records_are_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_full = [True]
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if is_full[0] and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr("os.fsync", fsync)

    async def write() -> None:
        writer = RecordWriter(tmp_path, "feedback")
        with pytest.raises(OSError, match="No space"):
            await writer.write(record("lost"))
        is_full[0] = False
        await writer.write(record("stored"))

    asyncio.run(write())
    assert "stored" in read_records(tmp_path, "feedback")["request"].to_pylist()

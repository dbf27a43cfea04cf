"""What clients gave to learn from is on the disk when they are told so, whatever becomes of the process."""

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

from engine.serve.http.feedback_store import Recorder, read_records

WRITER = """
import asyncio, sys
from datetime import UTC, datetime
from pathlib import Path
from engine.serve.http.feedback_store import Recorder

async def one(recorder, i):
    await recorder.write({"request": f"r{i}", "time": datetime.now(UTC), "text": "x" * (i % 50), "rating": 1})
    print(f"r{i}", flush=True)

async def main():
    recorder = Recorder(Path(sys.argv[1]), "feedback")
    for start in range(0, 100000, 8):
        await asyncio.gather(*(one(recorder, i) for i in range(start, start + 8)))

asyncio.run(main())
"""


def record(name: str, **more: Any) -> dict[str, Any]:
    return {"request": name, "time": datetime.now(UTC), "model": "m", "version": "v", "key": ""} | more


def test_records_come_back_in_order(tmp_path: Path) -> None:
    async def write() -> None:
        feedback, requests = Recorder(tmp_path, "feedback"), Recorder(tmp_path, "requests")
        for i in range(5):
            await feedback.write(record(f"r{i}", rating=-1, label="bug"))
        await requests.write(record("r0", path="/v1/classify", input='{"input": "é"}', output="[]", seconds=0.5))

    asyncio.run(write())
    asyncio.run(write())  # another process's file, as it were
    found = read_records(tmp_path, "feedback")
    assert found["request"].to_pylist() == [f"r{i}" for i in range(5)] * 2
    assert set(found["rating"].to_pylist()) == {-1}
    assert found["comment"].null_count == 10
    assert read_records(tmp_path, "requests")["input"].to_pylist() == ['{"input": "é"}'] * 2
    assert len(list(tmp_path.glob("feedback-*.arrows"))) == 2
    assert read_records(tmp_path / "none", "requests").num_rows == 0


def test_what_was_told_as_kept_outlives_a_kill(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        told = [process.stdout.readline().strip() for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().split()
    found = read_records(tmp_path, "feedback")["request"].to_pylist()
    assert set(told) <= set(found)
    assert len(found) == len(set(found))


def test_a_torn_end_costs_that_record_alone(tmp_path: Path) -> None:
    async def write() -> None:
        recorder = Recorder(tmp_path, "feedback")
        for i in range(3):
            await recorder.write(record(f"r{i}", text="word " * 50))

    asyncio.run(write())
    (file,) = tmp_path.glob("*.arrows")
    whole = file.read_bytes()
    for cut in (1, 100, 300):
        file.write_bytes(whole[:-cut])
        assert read_records(tmp_path, "feedback")["request"].to_pylist() == ["r0", "r1"]
    file.write_bytes(whole[:10])
    assert read_records(tmp_path, "feedback").num_rows == 0


def test_a_full_disk_is_told_and_the_next_record_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [True]
    whole = os.fsync

    def fsync(number: int) -> None:
        if broken[0] and not os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")
        whole(number)

    monkeypatch.setattr("os.fsync", fsync)

    async def write() -> None:
        recorder = Recorder(tmp_path, "feedback")
        with pytest.raises(OSError, match="No space"):
            await recorder.write(record("lost"))
        broken[0] = False
        await recorder.write(record("kept"))

    asyncio.run(write())
    assert "kept" in read_records(tmp_path, "feedback")["request"].to_pylist()

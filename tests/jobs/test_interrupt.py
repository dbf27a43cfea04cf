"""Ctrl-C at any point leaves no process behind and the last checkpoint whole; the same command goes on from there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from engine.train.checkpoint import Checkpoint, step_folders

COMMAND = [
    "pretrain", "name=mine", "model=llama_tiny", "data.max_documents=60", "data.vocab_size=512", "data.sequence_length=64",
    "train.global_batch=8", "train.precision=fp32", "train.max_steps=100000", "train.checkpoint_every=5", "tracking.enabled=false",
]  # fmt: skip


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "runs" / "mine" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_an_interrupted_run_leaves_nothing_and_goes_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.manta", *COMMAND],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 240
            while len(lines(tmp_path)) < 12:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=180)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    checkpoints = step_folders(tmp_path / "runs" / "mine" / "checkpoints")
    latest = Checkpoint(checkpoints[0])
    latest.verify()
    assert latest.state.step >= 10
    assert json.loads((tmp_path / "runs" / "mine" / "status.json").read_text())["state"] == "stopped"
    before = {line["step"]: line["loss"] for line in lines(tmp_path)}

    step = latest.state.step
    more = [word if "max_steps" not in word else f"train.max_steps={step + 3}" for word in COMMAND]
    pinned = ["schedule.total_steps=100000"]  # what train.max_steps was: the rate's course stays the same
    done = subprocess.run(
        [sys.executable, "-m", "jobs.manta", *more, *pinned, "resume=true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    after = {line["step"]: line["loss"] for line in lines(tmp_path)}
    assert max(after) == step + 3
    for common in set(before) & set(after):
        assert after[common] == before[common], common

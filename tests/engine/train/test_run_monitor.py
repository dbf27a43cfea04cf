"""The run monitor: progress, status and events from the files that workers write."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.config import Config, with_values
from engine.train import run_monitor
from engine.train.run_folder import RunFolder, RunStatus
from engine.train.run_monitor import RunMonitor, suppress_tracking_errors


def line(step: int, **changes: Any) -> str:
    return json.dumps({"step": step, "loss": 1.0 / step, "tokens_per_s": 10.0, **changes}) + "\n"


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(run_monitor, "console", Console(file=text, width=200))
    return text


def test_the_status_follows_the_metrics_and_events_are_printed(
    tiny: Config, tmp_path: Path, output: io.StringIO
) -> None:
    config = with_values(tiny, {"runs_dir": str(tmp_path), "name": "watched"})
    run = RunFolder.create_or_resume(config)
    run.log_event("an event of an earlier command")
    with RunMonitor(run, config, RunStatus("pretrain", "running")) as monitor:
        run.metrics_file.write_text(line(1) + line(2))
        deadline = time.monotonic() + 60
        while monitor.status.step < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        run.log_event("worker 1 was lost [signal 9]")
        with run.metrics_file.open("a") as file:
            file.write(line(3, loss=None, fault="the loss is nan"))
    assert (monitor.status.step, monitor.status.loss) == (3, 0.5)  # the last loss of a step that was not skipped
    assert run.status() == monitor.status
    assert "warning: worker 1 was lost [signal 9]" in output.getvalue()
    assert "earlier command" not in output.getvalue()


def test_lines_repeated_after_a_restart_are_not_shown_again_but_after_a_rollback_they_are(
    tiny: Config, tmp_path: Path
) -> None:
    monitor = RunMonitor(RunFolder(tmp_path), tiny, RunStatus("pretrain", "running"))
    lines = [{"step": 1}, {"step": 2}, {"step": 3}]
    assert monitor._new_lines(lines[:2]) == lines[:2]
    assert monitor._new_lines(lines) == lines[2:]
    rolled_back = [{"step": 2, "rollbacks": 1}, {"step": 3, "rollbacks": 1}]
    assert monitor._new_lines(rolled_back) == rolled_back


def test_a_failing_tracking_server_is_reported_and_other_interrupts_pass(output: io.StringIO) -> None:
    with suppress_tracking_errors():
        raise ConnectionError("refused")
    assert "MLflow did not accept the metrics (refused)" in output.getvalue()
    with pytest.raises(KeyboardInterrupt), suppress_tracking_errors():
        raise KeyboardInterrupt

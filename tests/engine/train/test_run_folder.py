"""A run's folder: creation and resumption, status, metrics, events."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engine.config import Config, to_dict, with_values
from engine.errors import UserError
from engine.train.run_folder import (
    MetricsLog,
    MetricsTail,
    RunFolder,
    RunStatus,
    adapter_folder,
    flatten_config,
    list_runs,
)


def test_a_run_is_resumed_with_the_same_config_only(tiny: Config, tmp_path: Path) -> None:
    config = with_values(tiny, {"runs_dir": str(tmp_path), "name": "one"})
    run = RunFolder.create_or_resume(config)
    assert RunFolder.create_or_resume(config).path == run.path
    changed = with_values(config, {"optim.lr": 0.5})
    with pytest.raises(UserError, match=r"exists with another config \(optim\.lr: .* -> 0\.5\)"):
        RunFolder.create_or_resume(changed)
    RunFolder.create_or_resume(with_values(changed, {"resume": True}))


def test_a_running_run_is_refused_and_a_dead_one_is_not(tiny: Config, tmp_path: Path) -> None:
    config = with_values(tiny, {"runs_dir": str(tmp_path), "name": "one"})
    run = RunFolder.create_or_resume(config)
    run.write_status(RunStatus("pretrain", "running", pid=os.getppid()))
    with pytest.raises(UserError, match="is running already"):
        RunFolder.create_or_resume(config)
    run.write_status(RunStatus("pretrain", "running", pid=2**22 + 1))  # above the largest process id of Linux
    RunFolder.create_or_resume(config)
    assert [(name, status.state) for name, status in list_runs(tmp_path)] == [("one", "stopped")]


def test_the_latest_run_is_listed_first(tmp_path: Path) -> None:
    for name, updated in (("older", 1.0), ("newer", 2.0)):
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name).write_status(RunStatus("pretrain", "finished", updated=updated))
    assert [name for name, _ in list_runs(tmp_path)] == ["newer", "older"]


def test_a_tail_returns_new_complete_lines_and_notices_a_new_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    tail = MetricsTail(run.metrics_file)
    assert tail.lines() == []
    run.metrics_file.write_text('{"step": 1}\n{"step"')
    assert tail.lines() == [{"step": 1}]
    with run.metrics_file.open("a") as file:
        file.write(": 2}\n")
    assert tail.lines() == [{"step": 2}]
    assert tail.lines() == []
    assert list(run.metrics()) == [{"step": 1}, {"step": 2}]
    log = MetricsLog(run, 1)  # a restart after step 1 replaces the file
    log({"step": 2, "loss": 1.0})
    log.close()
    assert tail.lines() == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_events_are_printed_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    run.report_event("worker 1 was lost")
    assert capsys.readouterr().out == "warning: worker 1 was lost\n"
    assert run.events.read_text().endswith(" worker 1 was lost\n")


def test_a_config_is_flattened_to_dotted_keys(tiny: Config) -> None:
    flat = flatten_config(json.loads(json.dumps(to_dict(tiny))))
    assert flat["optim.lr"] == tiny.optim.lr
    assert flat["name"] == tiny.name
    assert flat["zero.options"] == {}  # the value of one option, not a group


def test_an_adapter_lies_beside_its_bundle() -> None:
    assert adapter_folder(Path("run/bundle")) == Path("run/adapter")
    assert adapter_folder(Path("run/bundle-00000100")) == Path("run/adapter-00000100")
    assert adapter_folder(Path("elsewhere/mine")) == Path("elsewhere/mine-adapter")

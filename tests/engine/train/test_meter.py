"""The step meter: phases add up to a step's seconds, on one rank and on several; and the profiler's output."""

from __future__ import annotations

import gzip
import json
import time

import pytest
import torch

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.train.job import TrainJob
from engine.train.meter import PHASES, StepMeter
from tests.engine.train.ranks import losses, run_ranks

STEP_PHASES = [f"{phase}_s" for phase in PHASES if phase != "evaluation"]


def test_phases_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = StepMeter(torch.device("cpu"), flops_per_token=10.0, peak_flops=1e6, datasheet_flops=2e6)
    meter.enter_phase("forward")
    now[0] += 2
    with meter.phase("communication"):
        now[0] += 1
    now[0] += 3
    meter.enter_phase("evaluation")
    with meter.phase("communication"):  # part of the evaluation
        now[0] += 4
    meter.add_tokens(500)
    metrics = meter.end_step()
    assert (metrics["forward_s"], metrics["communication_s"], metrics["evaluation_s"]) == (5, 1, 4)
    assert metrics["seconds"] == sum(metrics[name] for name in STEP_PHASES) == 6
    assert metrics["tokens_per_s"] == pytest.approx(500 / 6)
    assert metrics["mfu"] == pytest.approx(500 * 10 / 6 / 1e6)
    assert metrics["mfu_datasheet"] == pytest.approx(metrics["mfu"] / 2)
    assert meter.end_step()["seconds"] == 0


def test_every_step_logs_the_time_of_each_phase(tiny: Config) -> None:
    data = prepare(tiny)
    values = {"name": "split", "zero.stage": 2, "train.workers": 2, "train.evaluate_every": 2}
    (lines,) = run_ranks([TrainJob(with_values(tiny, values), data)], 2)
    for line in lines:
        parts = [line[name] for name in STEP_PHASES]
        assert sum(parts) == pytest.approx(line["seconds"], rel=1e-6)
        assert all(line[f"{phase}_s"] > 0 for phase in ("data", "forward", "backward", "optimizer", "communication"))
        assert (line["evaluation_s"] > 0) == (line["step"] % 2 == 0)
        if line["step"] != 4:  # step 4 may wait for the copy of the previous checkpoint
            assert (line["checkpoint_s"] > 0) == (line["step"] % 3 == 0)
        assert line["communication_s"] < line["seconds"]
        assert 0 < line["mfu"] < 1
        assert 2**24 < line["peak_memory_bytes"] < 2**34


def test_profiling_changes_no_loss_and_writes_traces_and_a_summary(tiny: Config) -> None:
    data = prepare(tiny)
    plain = with_values(tiny, {"name": "unprofiled", "train.workers": 2, "train.max_steps": 7})
    profiled = with_values(plain, {"name": "profiled", "profile": True})
    short = with_values(plain, {"name": "short", "profile": True, "train.max_steps": 2, "schedule.total_steps": 7})
    first, second, third = run_ranks([TrainJob(config, data) for config in (plain, profiled, short)], 2)
    assert losses(first) == losses(second)
    assert losses(third) == losses(first)[:2]
    for config in (profiled, short):
        folder = config.run_dir / "profile"
        assert {path.name for path in folder.iterdir()} == {
            "trace-rank-0.json.gz", "trace-rank-1.json.gz", "summary.html"
        }  # fmt: skip
        events = json.loads(gzip.decompress((folder / "trace-rank-1.json.gz").read_bytes()))["traceEvents"]
        names = {event.get("name") for event in events}
        assert {"phase: forward", "phase: backward", "aten::mm"} <= names
        page = (folder / "summary.html").read_text()
        assert "aten::" in page
        assert "without the profiler" in page or config is short
        assert "http" not in page.replace("ui.perfetto.dev", "")
    assert (
        "Steps 4 to 6" in (profiled.run_dir / "profile" / "summary.html").read_text()
        or "Steps 5 to 7" in (profiled.run_dir / "profile" / "summary.html").read_text()
    )

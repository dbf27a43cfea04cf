"""Energy from hardware counters, or estimated, over all restarts of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.train.energy import WATTS_PER_CORE, EnergyCounter, EnergyMeter, rapl_counters, total_energy

CPU = torch.device("cpu")


def package(powercap: Path, name: str, microjoules: int) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text("100000000\n")  # 100 J
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_counters_of_cpu_packages_are_read_across_their_wrap_around(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 10_000_000), package(tmp_path, "intel-rapl:1", 90_000_000)
    core = package(tmp_path, "intel-rapl:0:0", 0)  # a zone within the first package
    unreadable = tmp_path / "intel-rapl:2"
    unreadable.mkdir()
    assert len(rapl_counters(tmp_path)) == 2
    meter = EnergyMeter(CPU, world_size=4, powercap=tmp_path)
    first.write_text("12500000")
    second.write_text("5000000")  # wrapped: 10 J to the end of the range, 5 J since
    core.write_text("70000000")
    assert meter.lap() == {"energy_measured_j": pytest.approx(2.5 + 15)}
    assert meter.lap() == {"energy_measured_j": 0.0}


def test_without_a_counter_energy_is_estimated_and_marked_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 110.0, 110.5])
    monkeypatch.setattr("engine.train.energy.time.monotonic", lambda: next(now))
    meter = EnergyMeter(CPU, world_size=3, powercap=tmp_path)
    watts = WATTS_PER_CORE * torch.get_num_threads() * 3
    assert meter.lap() == {"energy_estimated_j": pytest.approx(10 * watts)}
    assert meter.lap() == {"energy_estimated_j": pytest.approx(0.5 * watts)}


def test_a_counter_without_a_range_and_the_total_of_a_run() -> None:
    counts = iter([5.0, 7.0, 7.5])
    counter = EnergyCounter(lambda: next(counts))
    assert (counter.lap(), counter.lap()) == (2.0, 0.5)
    lines = [{"step": 1, "energy_measured_j": 2.0}, {"step": 2, "energy_measured_j": 0.5}, {"step": 3}]
    assert total_energy(lines)["measured_j"] == 2.5
    assert set(total_energy(lines)["how"]) == {"measured_j"}
    assert total_energy([{"step": 1}]) == {"measured_j": 0.0, "estimated_j": 0.0, "how": {}}

"""Profiles a few steps with torch's profiler: traces for Chrome and Perfetto, and an HTML summary."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from engine.train.meter import PHASES, StepMeter
from engine.train.process_group import ProcessGroup

PAGE = "summary.html"
WARM_UP_STEPS, RECORDED_STEPS = 3, 3  # steps before the profiler starts (allocations, compilation), steps recorded
MAX_TRACES = 8  # only the first ranks write a trace: those of a large run look alike
MAX_OPERATORS = 20  # on the page

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --paper: #fff; --line: #dde2ea; --mute: #667085; --bar: #2f6fde }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --paper: #14181f; --line: #333c4a; --mute: #98a2b3; --bar: #6ea0ff } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 56rem; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.1rem; margin-top: 2rem } .mute { color: var(--mute) }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line) } th { color: var(--mute); font-weight: 500 }
td.bar { width: 40% } td.bar div { height: .8rem; background: var(--bar) } td code { overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Operator:
    """Self time and memory of one operator over all recorded steps, without the operators that it calls."""

    name: str
    calls: int
    seconds: float
    allocated_bytes: int  # minus what it freed


class StepProfiler:
    """Is called after each step, like the logger, and profiles a few of them."""

    def __init__(self, folder: Path, title: str, group: ProcessGroup, meter: StepMeter, steps_left: int) -> None:
        """Record after a warm-up, which is shorter in a short run; write to `folder`."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if group.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.folder, self.title, self.rank, self.meter = folder, title, group.rank, meter
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self._warm_up = max(0, min(WARM_UP_STEPS, steps_left - RECORDED_STEPS))
        self._before: list[dict[str, Any]] = []
        self._recorded: list[dict[str, Any]] = []
        self._start_if_due()

    def __call__(self, line: dict[str, Any]) -> None:
        """Count a step that has just ended."""
        if self.meter.is_profiling:
            self._recorded.append(line)
            if len(self._recorded) == RECORDED_STEPS:
                self.finish()
        elif not self._recorded:
            self._before.append(line)
            self._start_if_due()

    def finish(self) -> None:
        """Write the traces and the summary, unless nothing was recorded or they are written already."""
        if not self.meter.is_profiling:
            return
        self.meter.is_profiling = False
        self._profiler.stop()
        if not self._recorded or self.rank >= MAX_TRACES:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.folder / f"trace-rank-{self.rank}.json.gz"))
        if self.rank == 0:
            page = summary_page(self.title, self._before, self._recorded, operator_times(self._profiler))
            (self.folder / PAGE).write_text(page, encoding="utf-8")

    def _start_if_due(self) -> None:
        if len(self._before) == self._warm_up:
            self.meter.is_profiling = True
            self._profiler.start()


def operator_times(profiler: torch.profiler.profile) -> list[Operator]:
    """Return the recorded operators, the longest first: by GPU time if there is any, else by CPU time."""
    averages = [event for event in profiler.key_averages() if not event.key.startswith(("phase: ", "ProfilerStep"))]
    on_device = any(event.self_device_time_total > 0 for event in averages)
    records = [
        Operator(
            name=event.key,
            calls=event.count,
            seconds=(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6,
            allocated_bytes=event.self_device_memory_usage if on_device else event.self_cpu_memory_usage,
        )
        for event in averages
    ]
    return sorted((operator for operator in records if operator.seconds > 0), key=lambda operator: -operator.seconds)


def summary_page(
    title: str, before: list[dict[str, Any]], recorded: list[dict[str, Any]], operators: list[Operator]
) -> str:
    """Return the HTML page; `before`, `recorded`: metric lines of the steps before and while the profiler ran."""
    steps = len(recorded)
    seconds = statistics.mean(line["seconds"] for line in recorded)
    phases = {phase: statistics.mean(line[f"{phase}_s"] for line in recorded) for phase in PHASES}
    share = {phase: value / seconds for phase, value in phases.items() if value and phase != "evaluation"}
    other_seconds = max(0.0, seconds - sum(operator.seconds for operator in operators) / steps)
    longest = max(share, key=lambda phase: share[phase])
    headline = f"The {longest} takes {share[longest]:.0%} of a step."
    if operators:
        headline += (
            f" Of the operators {operators[0].name} is first, with {operators[0].seconds / steps / seconds:.0%}."
        )
    unprofiled = f", {before[-1]['seconds']:.4g} s without the profiler" if before else ""
    last = recorded[-1]
    bars = "".join(
        f"<tr><td>{phase}<td>{1000 * phases[phase]:,.1f} ms<td>{part:.1%}<td class=bar><div style='width:{100 * part:.1f}%'></div>"
        for phase, part in share.items()
    )
    rows = "".join(
        f"<tr><td><code>{escape(operator.name)}</code><td>{operator.calls / steps:,.0f}<td>{1000 * operator.seconds / steps:,.2f} ms"
        f"<td>{operator.seconds / steps / seconds:.1%}<td>{operator.allocated_bytes / steps / 2**20:,.1f} MiB"
        for operator in operators[:MAX_OPERATORS]
    )
    hidden_seconds = sum(operator.seconds for operator in operators[MAX_OPERATORS:]) / steps
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}: where a step's time goes</h1>"
        f"<p><b>{escape(headline)}</b><p class=mute>Steps {recorded[0]['step']} to {last['step']} on rank 0: {seconds:.4g} s each{unprofiled}; "
        f"{last['tokens_per_s']:,.0f} tokens/s, MFU {last['mfu']:.1%} of the measured matrix-product rate; "
        f"peak memory {last['peak_memory_bytes'] / 2**20:,.0f} MiB."
        f"<h2>By phase</h2><table><tr><th>phase<th>a step<th>share<th></tr>{bars}</table>"
        "<p class=mute>A loss over a vocabulary finds its gradient for the output embedding in the forward phase."
        f"<h2>By operator</h2><table><tr><th>operator, without what it calls<th>calls<th>a step<th>share<th>memory kept</tr>{rows}"
        f"<tr><td>{max(0, len(operators) - MAX_OPERATORS)} others<td><td>{1000 * hidden_seconds:,.2f} ms<td>{hidden_seconds / seconds:.1%}<td>"
        f"<tr><td>outside of operators (Python, waiting)<td><td>{1000 * other_seconds:,.2f} ms<td>{other_seconds / seconds:.1%}<td></table>"
        "<p class=mute>The full traces are in trace-rank-*.json.gz beside this page: open them at ui.perfetto.dev or chrome://tracing.</html>\n"
    )

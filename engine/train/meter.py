"""Meter of a step: seconds by phase, tokens/s, model FLOPs utilization (MFU) and peak memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.train.hardware import peak_memory_bytes, reset_peak_memory

# A step's `seconds` are the sum over all phases except evaluation.
PHASES = ("data", "forward", "backward", "optimizer", "communication", "checkpoint", "evaluation")


class StepMeter:
    """Measures a step. It is always in exactly one phase, so that the phases add up to the whole.

    On a GPU it records CUDA events, which cost microseconds, and never synchronizes within a step: a phase is the GPU's
    time between its events. Communication that overlaps with other work counts only where that work waits for it.
    """

    def __init__(
        self, device: torch.device, flops_per_token: float, peak_flops: float, datasheet_flops: float | None = None
    ) -> None:
        """`peak_flops`, `datasheet_flops`: FLOP/s of all workers together, measured, and by datasheet if the device is known."""
        self.device, self.flops_per_token = device, flops_per_token
        self.peak_flops, self.datasheet_flops = peak_flops, datasheet_flops
        self.is_profiling = False  # whether phases are labeled for torch's profiler
        self._phase = ""
        self._marks: list[tuple[str, Any]] = []
        self._label: Any = None
        self._tokens = 0
        reset_peak_memory(device)

    def enter_phase(self, phase: str) -> None:
        """End the current phase and start this one."""
        self._phase = phase
        self._marks.append((phase, self._timestamp()))
        if self.is_profiling or self._label:
            self._set_label(phase)

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Enter a phase for a block, then the previous one again; evaluation is one phase, whatever happens in it."""
        previous = self._phase
        if previous in ("", "evaluation"):
            yield
            return
        self.enter_phase(phase)
        try:
            yield
        finally:
            self.enter_phase(previous)

    def add_tokens(self, tokens: int) -> None:
        """Add to the step's number of tokens, over all workers."""
        self._tokens += tokens

    def end_step(self) -> dict[str, Any]:
        """Return the step's seconds, in total and by phase, its rates and this worker's peak memory, and reset."""
        self.enter_phase("")
        spent: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[phase] += self._seconds(start, end)
        seconds = sum(value for phase, value in spent.items() if phase != "evaluation")
        flops = self._tokens * self.flops_per_token / seconds if seconds else 0.0
        metrics = {
            "tokens_per_s": self._tokens / seconds if seconds else 0.0,
            "mfu": flops / self.peak_flops,
            **({"mfu_datasheet": flops / self.datasheet_flops} if self.datasheet_flops else {}),
            "seconds": seconds,
            **{f"{phase}_s": spent[phase] for phase in PHASES},
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        self._marks, self._tokens = [], 0
        return metrics

    def _timestamp(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()  # returns at once: reading the loss has synchronized already
        return float(start.elapsed_time(end)) / 1000

    def _set_label(self, phase: str) -> None:
        if self._label:
            self._label.__exit__(None, None, None)
            self._label = None
        if self.is_profiling and phase:
            self._label = torch.autograd.profiler.record_function(f"phase: {phase}")
            self._label.__enter__()

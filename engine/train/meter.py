"""How long the parts of a step take, how much of the hardware it uses, and how much memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.train.hardware import peak_memory_bytes, reset_peak_memory

# A step's seconds are the sum of all but the evaluation's.
PHASES = ("data", "forward", "backward", "optimizer", "communication", "checkpoint", "evaluation")


class Meter:
    """A clock that is always in one phase, so that the phases add up to the whole.

    On a GPU it notes events in the stream of work, which cost microseconds, and never waits for it within a step: a
    phase is the time that the GPU was given to it. Communication that runs beside other work counts only where that waits.
    """

    def __init__(
        self, device: torch.device, flops_per_token: float, peak_flops: float, datasheet_flops: float | None = None
    ) -> None:
        """Take the rates of all workers together, in FLOP/s; `datasheet_flops` where the device is a known one."""
        self.device, self.flops_per_token = device, flops_per_token
        self.peak_flops, self.datasheet_flops = peak_flops, datasheet_flops
        self.labelled = False  # whether a profiler sees the phases
        self._phase = ""
        self._marks: list[tuple[str, Any]] = []
        self._label: Any = None
        self._tokens = 0
        reset_peak_memory(device)

    def enter(self, phase: str) -> None:
        """End the phase under way, and begin this one."""
        self._phase = phase
        self._marks.append((phase, self._now()))
        if self.labelled or self._label:
            self._relabel(phase)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in a phase for a while, then again in the one before; an evaluation is one phase, whatever it does."""
        before = self._phase
        if before in ("", "evaluation"):
            yield
            return
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def count(self, tokens: int) -> None:
        """Note that the step has so many tokens, over all workers."""
        self._tokens += tokens

    def read(self) -> dict[str, Any]:
        """Return the step's seconds, whole and by phase, its rates, and this worker's peak memory; begin anew."""
        self.enter("")
        spent: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[phase] += self._seconds(start, end)
        seconds = sum(value for phase, value in spent.items() if phase != "evaluation")
        flops = self._tokens * self.flops_per_token / seconds if seconds else 0.0
        found = {
            "tokens_per_s": self._tokens / seconds if seconds else 0.0,
            "mfu": flops / self.peak_flops,
            **({"mfu_datasheet": flops / self.datasheet_flops} if self.datasheet_flops else {}),
            "seconds": seconds,
            **{f"{phase}_s": spent[phase] for phase in PHASES},
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        self._marks, self._tokens = [], 0
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()  # the loss was read already: nothing is left to wait for
        return float(start.elapsed_time(end)) / 1000

    def _relabel(self, phase: str) -> None:
        if self._label:
            self._label.__exit__(None, None, None)
            self._label = None
        if self.labelled and phase:
            self._label = torch.autograd.profiler.record_function(f"phase: {phase}")
            self._label.__enter__()

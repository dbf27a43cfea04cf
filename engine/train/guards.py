"""Guards against bad steps: decides what to do when a loss or a gradient norm is not finite or spikes. The loop acts on it.

Pure functions of values that are the same on all ranks (global loss, global gradient norm, train state), so that all ranks
reach the same decision without communication.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import TrainConfig
from engine.train.train_state import TrainState


@dataclass(frozen=True)
class AcceptStep:
    """Keep the step."""


@dataclass(frozen=True)
class SkipStep:
    """Leave the weights unchanged and continue with the next batch."""

    reason: str


@dataclass(frozen=True)
class RollBack:
    """Restore the last good checkpoint and skip the data since then."""

    reason: str


@dataclass(frozen=True)
class StopRun:
    """End the run with an error."""

    reason: str


Decision = AcceptStep | SkipStep | RollBack | StopRun


def check_loss(loss: float, recent: Sequence[float], train: TrainConfig) -> str:
    """Return what is wrong with a global loss, before the weights change; empty if nothing is.

    A spike is more than train.spike_sigma standard deviations above the mean of the last train.spike_window losses that
    were not spikes. With fewer losses there is no spike detection.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if train.spike_sigma is None or len(recent) < train.spike_window:
        return ""
    mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
    if loss <= mean + train.spike_sigma * deviation:
        return ""
    return (
        f"the loss {loss:.4g} is a spike: more than {train.spike_sigma:g} x {deviation:.2g} over the mean {mean:.4g} "
        f"of {len(recent)} steps"
    )


def check_grad_norm(grad_norm: float) -> str:
    """Return what is wrong with a global gradient norm; empty if nothing is."""
    return "" if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"


def decide(fault: str, state: TrainState, train: TrainConfig) -> Decision:
    """Decide about a step with this fault (empty: none) that started from this state."""
    if not fault:
        return AcceptStep()
    max_skipped = train.max_skipped
    if state.loss_scale:
        max_skipped += int(math.log2(state.loss_scale))  # fp16: overflows are normal until the scale has fallen
    if state.skipped_in_a_row < max_skipped:
        return SkipStep(fault)
    history = f", after {state.skipped_in_a_row} in a row were skipped" if state.skipped_in_a_row else ""
    if state.rollbacks < train.max_rollbacks:
        return RollBack(fault + history)
    return StopRun(fault + history + (f" and {state.rollbacks} rollbacks" if state.rollbacks else ""))


def append_recent_loss(recent: Sequence[float], loss: float, train: TrainConfig) -> tuple[float, ...]:
    """Return the window of losses for spike detection, with the loss of a good step added."""
    if train.spike_sigma is None:
        return ()
    return (*recent, loss)[-train.spike_window :]

"""What to do with a step whose loss or gradient cannot be trusted: decided here, carried out in the loop.

Pure functions of what all ranks know alike (the global loss, the global norm, the train state), so that all ranks decide
the same without asking each other.
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
    """Nothing is wrong with the step."""


@dataclass(frozen=True)
class SkipStep:
    """Leave the weights as they are and go on with the next batch."""

    reason: str


@dataclass(frozen=True)
class RollBack:
    """Go back to the last good checkpoint and pass over the data since then."""

    reason: str


@dataclass(frozen=True)
class StopRun:
    """End the run."""

    reason: str


Decision = AcceptStep | SkipStep | RollBack | StopRun


def check_loss(loss: float, recent: Sequence[float], train: TrainConfig) -> str:
    """Say what is wrong with a global loss before the weights change; empty for nothing.

    A spike lies more than train.spike_sigma standard deviations above the mean of the last train.spike_window losses
    that were no spikes; with fewer losses nothing is one.
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


def check_grad_norm(norm: float) -> str:
    """Say what is wrong with a global gradient norm; empty for nothing."""
    return "" if math.isfinite(norm) else f"the gradient norm is {norm}"


def decide(fault: str, state: TrainState, train: TrainConfig) -> Decision:
    """Decide on a step with that fault, which was taken from that state."""
    if not fault:
        return AcceptStep()
    allowed = train.max_skipped
    if state.loss_scale:
        allowed += int(math.log2(state.loss_scale))  # fp16: so often the scale can fall before that is a sign
    if state.skipped_in_a_row < allowed:
        return SkipStep(fault)
    before = f", after {state.skipped_in_a_row} in a row were skipped" if state.skipped_in_a_row else ""
    if state.rollbacks < train.max_rollbacks:
        return RollBack(fault + before)
    return StopRun(fault + before + (f" and {state.rollbacks} roll-backs" if state.rollbacks else ""))


def append_recent_loss(recent: Sequence[float], loss: float, train: TrainConfig) -> tuple[float, ...]:
    """Return the losses to judge the next one by, with that of a good step added."""
    if train.spike_sigma is None:
        return ()
    return (*recent, loss)[-train.spike_window :]

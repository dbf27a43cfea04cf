"""The learning rate, as a pure function of the step."""

from __future__ import annotations

import importlib

from engine.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up to optim.lr, then decay to min_ratio times that.

    The decay is that of engine/train/schedules/<schedule.kind>.py.
    """
    warmup, total, peak = config.warmup_steps, config.total_steps, config.optim.lr
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    schedule = importlib.import_module(f"engine.train.schedules.{config.schedule.kind}")
    factor: float = schedule.decay(progress, config.schedule)
    return peak * (config.schedule.min_ratio + (1 - config.schedule.min_ratio) * factor)

"""Learning rate schedules, as a pure function of the step."""

from __future__ import annotations

import math

from engine.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up to optim.lr, then decay to min_ratio times that.

    Cosine: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983. Wsd (warm-up, stable, decay): Hu et al. 2024,
    https://arxiv.org/abs/2404.06395, with a linear decay over the last schedule.decay_fraction of the steps.
    """
    warmup, total, peak = config.warmup_steps, config.total_steps, config.optim.lr
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    factors = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "wsd": min(1.0, (1 - progress) / config.schedule.decay_fraction),
    }
    factor = factors[config.schedule.kind]
    return peak * (config.schedule.min_ratio + (1 - config.schedule.min_ratio) * factor)

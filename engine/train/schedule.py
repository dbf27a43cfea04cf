"""The learning rate of a step, a pure function."""

from __future__ import annotations

import math

from engine.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Return the rate of step `step` (from 0): linear warm-up to optim.lr, then down to min_ratio of it.

    Cosine: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983. Wsd (warm-up, stable, decay): Hu et al. 2024,
    https://arxiv.org/abs/2404.06395, with a linear decay over the last schedule.decay_fraction of the steps.
    """
    warmup, total, peak = config.warmup_steps, config.total_steps, config.optim.lr
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    shapes = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": min(1.0, (1 - done) / config.schedule.decay_fraction),
    }
    shape = shapes[config.schedule.kind]
    return peak * (config.schedule.min_ratio + (1 - config.schedule.min_ratio) * shape)

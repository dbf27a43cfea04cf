"""Half a cosine: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983."""

from __future__ import annotations

import math

from engine.config import ScheduleConfig


def decay(progress: float, options: ScheduleConfig) -> float:
    """Return the factor between schedule.min_ratio (0) and the peak (1); `progress` goes from 0 to 1 after the warm-up."""
    return (1 + math.cos(math.pi * progress)) / 2

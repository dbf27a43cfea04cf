"""Warm-up, stable, decay: Hu et al. 2024, https://arxiv.org/abs/2404.06395, with a linear decay at the end."""

from __future__ import annotations

from engine.config import ScheduleConfig


def decay(progress: float, options: ScheduleConfig) -> float:
    """Return the factor between schedule.min_ratio (0) and the peak (1); `progress` goes from 0 to 1 after the warm-up."""
    return min(1.0, (1 - progress) / options.decay_fraction)

"""Linear decay from the end of the warm-up."""

from __future__ import annotations

from engine.config import ScheduleConfig


def decay(progress: float, options: ScheduleConfig) -> float:
    """Return the factor between schedule.min_ratio (0) and the peak (1); `progress` goes from 0 to 1 after the warm-up."""
    return 1 - progress

"""Progress of a sweep: a live table on a terminal, else a line for each trial that is over or paused."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table

from engine.progress import console
from engine.sweep.trial_record import PAUSED, Trial, best_first, current_best

MAX_ROWS = 12  # of the table
REFRESH_S = 0.25  # between updates of the table


class ProgressTable:
    """Shows the trials: `with ProgressTable(16, 90, "accuracy", "max") as table: table.show(trials)`."""

    def __init__(self, total: int, steps: int, metric: str, mode: str) -> None:
        """Expect `total` trials of at most `steps` steps."""
        self._total, self._steps, self._metric, self._mode = total, steps, metric, mode
        self._live: Live | None = None
        self._printed: set[tuple[int, str, int]] = set()
        self._refreshed_at = 0.0

    def __enter__(self) -> ProgressTable:
        """Start the live table."""
        self._started_at, self._initial_progress = time.monotonic(), -1.0
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def show(self, trials: Iterable[Trial]) -> None:
        """Show the state of the trials."""
        current = list(trials)
        if self._initial_progress < 0:  # progress of an earlier command does not count for this one's speed
            self._initial_progress = self._progress(current)
        if self._live:
            if time.monotonic() - self._refreshed_at > REFRESH_S or self._progress(current) >= 1:
                self._refreshed_at = time.monotonic()
                self._live.update(self.render(current), refresh=True)
            return
        for trial in current:
            is_resting = trial.is_over or trial.state == PAUSED
            if is_resting and (trial.index, trial.state, trial.steps) not in self._printed:
                self._printed.add((trial.index, trial.state, trial.steps))
                console.print(f"trial     {self._line(trial)}  ({self._summary(current)})", markup=False)

    def render(self, trials: list[Trial]) -> Table:
        """Return the table: running and paused trials, then those with a result, the best first, then the others."""
        table = Table(title=f"sweep: {self._summary(trials)}", title_justify="left", box=None, padding=(0, 2, 0, 0))
        keys = sorted({key for trial in trials for key in trial.params})
        for column in ("trial", "", "step", self._metric, *keys, "why"):
            table.add_column(column, no_wrap=column not in (*keys, "why"), overflow="ellipsis")
        best = best_first(trials, self._mode)
        order = [t for t in trials if not t.is_over] + best + [t for t in trials if t.is_over and not t.has_result]
        for trial in order[:MAX_ROWS]:
            values = (format_value(trial.params[key]) if key in trial.params else "" for key in keys)
            table.add_row(
                trial.name, trial.state, f"{trial.steps}/{self._steps}", format_value(trial.value), *values, trial.reason[:60],
                style="bold" if best and trial is best[0] else "",
            )  # fmt: skip
        if len(order) > MAX_ROWS:
            table.add_row(f"and {len(order) - MAX_ROWS} more")
        return table

    def _line(self, trial: Trial) -> str:
        params = " ".join(f"{key}={format_value(value)}" for key, value in trial.params.items())
        why = f": {trial.reason[:200]}" if trial.reason else ""
        return f"{trial.name} {trial.state} at step {trial.steps}, {self._metric} {format_value(trial.value)}, {params}{why}"

    def _summary(self, trials: list[Trial]) -> str:
        best = current_best(trials, self._mode)
        over, done = sum(trial.is_over for trial in trials), self._progress(trials)
        best_text = f"best {format_value(best.value)} by {best.name}, " if best else ""
        seconds = time.monotonic() - self._started_at
        left = (
            seconds * (1 - done) / (done - self._initial_progress) if done > self._initial_progress >= 0 else math.nan
        )
        return f"{best_text}{over} of {self._total} over, {seconds:.0f} s" + (
            f", {left:.0f} s left" if left == left else ""
        )

    def _progress(self, trials: list[Trial]) -> float:
        return sum(1.0 if t.is_over else min(1.0, t.steps / self._steps) for t in trials) / max(1, self._total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the live table; its last state stays on the screen."""
        if self._live:
            self._live.stop()


def format_value(value: Any) -> str:
    """Format a value in a few characters."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

"""What a user sees of a sweep: a live table on a terminal, a line for each trial that is over, or waits, elsewhere."""

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

MAX_ROWS = 12  # of the table, at most
REFRESH_S = 0.25  # between two pictures of it


class ProgressTable:
    """Shows the trials: `with Board(16, 90, "accuracy", "max") as board: board.show(trials)`."""

    def __init__(self, total: int, steps: int, metric: str, mode: str) -> None:
        """Expect `total` trials of `steps` steps at most."""
        self._total, self._steps, self._metric, self._mode = total, steps, metric, mode
        self._live: Live | None = None
        self._told: set[tuple[int, str, int]] = set()
        self._shown = 0.0

    def __enter__(self) -> ProgressTable:
        """Begin to show."""
        self._began, self._at_start = time.monotonic(), -1.0
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def show(self, trials: Iterable[Trial]) -> None:
        """Show how the trials stand."""
        known = list(trials)
        if self._at_start < 0:  # what an earlier command has done says nothing of this one's speed
            self._at_start = self._progress(known)
        if self._live:
            if time.monotonic() - self._shown > REFRESH_S or self._progress(known) >= 1:
                self._shown = time.monotonic()
                self._live.update(self.table(known), refresh=True)
            return
        for trial in known:
            rests = trial.over or trial.state == PAUSED
            if rests and (trial.index, trial.state, trial.steps) not in self._told:
                self._told.add((trial.index, trial.state, trial.steps))
                console.print(f"trial     {self._line(trial)}  ({self._standing(known)})", markup=False)

    def table(self, trials: list[Trial]) -> Table:
        """Return the table: those that run, then the best of those that are over, then the others."""
        found = Table(title=f"sweep: {self._standing(trials)}", title_justify="left", box=None, padding=(0, 2, 0, 0))
        keys = sorted({key for trial in trials for key in trial.params})
        for column in ("trial", "", "step", self._metric, *keys, "why"):
            found.add_column(column, no_wrap=column not in (*keys, "why"), overflow="ellipsis")
        best = best_first(trials, self._mode)
        order = [t for t in trials if not t.over] + best + [t for t in trials if t.over and not t.usable]
        for trial in order[:MAX_ROWS]:
            values = (format_value(trial.params[key]) if key in trial.params else "" for key in keys)
            found.add_row(
                trial.name, trial.state, f"{trial.steps}/{self._steps}", format_value(trial.value), *values, trial.reason[:60],
                style="bold" if best and trial is best[0] else "",
            )  # fmt: skip
        if len(order) > MAX_ROWS:
            found.add_row(f"and {len(order) - MAX_ROWS} more")
        return found

    def _line(self, trial: Trial) -> str:
        params = " ".join(f"{key}={format_value(value)}" for key, value in trial.params.items())
        why = f": {trial.reason[:200]}" if trial.reason else ""
        return f"{trial.name} {trial.state} at step {trial.steps}, {self._metric} {format_value(trial.value)}, {params}{why}"

    def _standing(self, trials: list[Trial]) -> str:
        best = current_best(trials, self._mode)
        over, done = sum(trial.over for trial in trials), self._progress(trials)
        told = f"best {format_value(best.value)} by {best.name}, " if best else ""
        seconds = time.monotonic() - self._began
        left = seconds * (1 - done) / (done - self._at_start) if done > self._at_start >= 0 else math.nan
        return f"{told}{over} of {self._total} over, {seconds:.0f} s" + (f", {left:.0f} s left" if left == left else "")

    def _progress(self, trials: list[Trial]) -> float:
        return sum(1.0 if t.over else min(1.0, t.steps / self._steps) for t in trials) / max(1, self._total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing; the last state stays on the screen."""
        if self._live:
            self._live.stop()


def format_value(value: Any) -> str:
    """Return a value in a few characters."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

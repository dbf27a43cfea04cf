"""Progress of long tasks: a live bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


class ProgressBar:
    """Shows the progress of a task: `with ProgressBar("pretrain", total=200) as bar: bar.update(3, "loss 7.10")`."""

    def __init__(self, title: str, total: int, every_s: float = 5.0) -> None:
        """Show `title` and the progress to `total`; without a terminal, at most one line every `every_s` seconds."""
        self.title, self.total, self.every_s = title, total, every_s
        self._started_at = time.monotonic()
        self._last_line_s = 0.0
        self._live: Progress | None = None

    def __enter__(self) -> ProgressBar:
        """Start the bar."""
        self._started_at = time.monotonic()
        if console.is_terminal:
            columns = ("{task.description}", "{task.completed}/{task.total}", "{task.fields[text]}")
            title, count, text = (TextColumn(column) for column in columns)
            self._live = Progress(
                title, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn(), text, console=console
            )
            self._task = self._live.add_task(f"{self.title:<9}", total=self.total, text="")
            self._live.start()
        return self

    def update(self, done: int, text: str = "") -> None:
        """Show the number done, and a text."""
        if self._live:
            self._live.update(self._task, completed=done, text=text)
            return
        elapsed = time.monotonic() - self._started_at
        if done >= self.total or elapsed - self._last_line_s >= self.every_s:
            self._last_line_s = elapsed
            console.print(f"{self.title:<9} {done}/{self.total}  {elapsed:.0f} s  {text}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar; its last state stays on the screen."""
        if self._live:
            self._live.stop()

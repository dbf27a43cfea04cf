"""Monitors a run from the driver: progress bar, status.json and MLflow follow metrics.jsonl while the workers write it."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from typing import Any

from engine.config import Config
from engine.progress import ProgressBar, console
from engine.train.run_folder import MetricsTail, RunFolder, RunStatus, now

COUNTERS = {"skipped": "skipped", "rollbacks": "rolled back"}  # key in metrics.jsonl -> label on the progress bar


class RunMonitor:
    """Reads metrics.jsonl in a thread, and updates the progress bar, status.json and MLflow."""

    def __init__(self, run: RunFolder, config: Config, status: RunStatus) -> None:
        """Monitor `run`, whose current status is `status`."""
        self.run, self.config, self.status = run, config, status
        self._last_step = self._last_rollbacks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="run-monitor", daemon=True)

    def __enter__(self) -> RunMonitor:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Show what is left and end the MLflow run."""
        self._mlflow_status = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        tracked = None
        tail, events = MetricsTail(self.run.metrics_file), self.run.events
        offset = events.stat().st_size if events.exists() else 0
        with ProgressBar(self.config.job, total=self.config.train.max_steps) as bar:
            while True:
                stopping = self._stop.wait(0.2)
                offset = self._print_events(offset)
                lines = self._new_lines(tail.lines())
                if lines:
                    self._show(bar, lines[-1])
                    if self.config.tracking.enabled:
                        with suppress_tracking_errors():
                            if tracked is None:
                                from engine.train.tracking import TrackedRun

                                tracked = TrackedRun(self.config)
                            tracked.log(lines, int(time.time() * 1000))
                if stopping:
                    break
        if tracked:
            with suppress_tracking_errors():
                tracked.end(self._mlflow_status)

    def _new_lines(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the lines that were not shown before a restart; steps repeated after a rollback are new."""
        new = []
        for line in lines:
            rollbacks = line.get("rollbacks", 0)
            if line["step"] > self._last_step or rollbacks > self._last_rollbacks:
                self._last_step, self._last_rollbacks = line["step"], rollbacks
                new.append(line)
        return new

    def _print_events(self, offset: int) -> int:
        """Print the events from byte `offset` of the event log; return the offset after them."""
        if not self.run.events.exists():
            return offset
        with self.run.events.open("rb") as file:
            file.seek(offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        for event in complete.decode().splitlines():
            console.print(f"warning: {event.split(' ', 2)[2]}", markup=False)  # an error's text may contain brackets
        return offset + len(complete)

    def _show(self, bar: ProgressBar, line: dict[str, Any]) -> None:
        validation = next((f"  {k} {v:.4f}" for k, v in line.items() if k.startswith("validation_")), "")
        loss = self.status.loss if line["loss"] is None else line["loss"]
        text = f"skipped: {line.get('fault', 'no finite gradient')}" if line["loss"] is None else f"loss {loss:.4f}"
        counters = "".join(f"  {line[name]} {word}" for name, word in COUNTERS.items() if line.get(name))
        bar.update(line["step"], f"{text}  {line['tokens_per_s']:,.0f} tokens/s{counters}{validation}")
        self.status = replace(self.status, step=line["step"], loss=loss, updated=now())
        with contextlib.suppress(OSError):  # a full disk
            self.run.write_status(self.status)


class suppress_tracking_errors:
    """Report a failing MLflow server and continue: metrics.jsonl has everything."""

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        """Print the error."""
        if error is not None and isinstance(error, Exception):
            console.print(
                f"warning: MLflow did not accept the metrics ({str(error).splitlines()[0][:200]}); metrics.jsonl has them"
            )
            return True
        return False

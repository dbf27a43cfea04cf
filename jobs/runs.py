"""List the runs (state, progress, loss, age, lineage), or show one: its options, loss curve, lineage and checkpoints."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from engine.config import Config, flatten, read_tree
from engine.errors import UserError, did_you_mean
from engine.train.run_folder import RunFolder, RunStatus, flatten_config, list_runs

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 64  # maximum length of a curve, in characters


def main(argv: Sequence[str] | None = None) -> int:
    """Run `manta runs`."""
    parser = argparse.ArgumentParser(prog="manta runs", description=__doc__)
    parser.add_argument("name", nargs="?", help="show this run")
    parser.add_argument(
        "--verify", action="store_true", help="read the run's checkpoints completely, and report which are intact"
    )
    parser.add_argument("--runs-dir", default="runs", help="folder with all runs (default: runs)")
    options = parser.parse_args(argv)
    runs = list_runs(Path(options.runs_dir))
    if options.name:
        status = dict(runs).get(options.name)
        if status is None:
            raise UserError(
                f"there is no run '{options.name}' in {options.runs_dir}{did_you_mean(options.name, dict(runs))}"
            )
        console = Console(highlight=False, soft_wrap=True)
        for title, lines in describe_run(
            RunFolder(Path(options.runs_dir) / options.name), status, options.verify
        ).items():
            for i, line in enumerate(lines):
                console.print(f"{title if i == 0 else '':<12}{line}", markup=False)
        return 0
    if not runs:
        print(f"there is no run in {options.runs_dir} yet: manta pretrain starts one")
        return 0
    table = Table("name", "job", "state", "step", "loss", "age", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("from", overflow="fold")
    for name, run in runs:
        parents = " <- ".join(
            Path(p).parent.name if Path(p).name == "bundle" else Path(p).name for p in (run.parent, run.data) if p
        )
        loss = f"{run.loss:.4f}" if run.loss is not None else ""
        table.add_row(
            name, run.job, run.state, f"{run.step}/{run.max_steps}", loss, age(time.time() - run.updated), parents
        )
    Console().print(table)
    return 0


def describe_run(run: RunFolder, status: RunStatus, verify: bool) -> dict[str, list[str]]:
    """Return the description of one run, title -> lines."""
    metrics = list(run.metrics())
    summary = f"{status.job}, {status.state}, step {status.step} of {status.max_steps}, {age(time.time() - status.updated)} ago"
    sections = {"run": [summary, *([status.message] if status.message else [])]}
    sections["options"] = changed_options(read_tree(run.config_file)) if run.config_file.is_file() else []
    for name in ("loss", "validation_loss"):
        values = [line[name] for line in metrics if line.get(name) is not None]
        if values:
            sections[name.replace("_", " ")] = [
                f"{curve(values)} {values[0]:.4f} -> {values[-1]:.4f}, minimum {min(values):.4f}"
            ]
    sections["from"] = [
        f"{kind} {folder}" for kind, folder in (("data", status.data), ("bundle", status.parent)) if folder
    ]
    if (file := run.bundle / "manta.json").is_file():
        bundle = json.loads(file.read_text())
        sections["bundle"] = [f"{run.bundle} (step {bundle['run']['step']}, hash {bundle['hash'][:12]})"]
    sections["checkpoints"] = checkpoint_lines(run, verify)
    return sections


def changed_options(tree: dict[str, Any]) -> list[str]:
    """Return KEY=VALUE of each option of a run that differs from its default."""
    defaults = flatten(Config())
    return [f"{key}={value}" for key, value in flatten_config(tree).items() if defaults.get(key, value) != value]


def checkpoint_lines(run: RunFolder, verify: bool) -> list[str]:
    """Return a line for each checkpoint: its folder, its size and, with `verify`, whether it is intact."""
    from engine.plan.plan import format_bytes  # imports torch, which a list of runs doesn't need
    from engine.train.checkpoint import BrokenCheckpoint, Checkpoint, step_folders

    lines = []
    for folder in step_folders(run.checkpoints):
        try:
            checkpoint = Checkpoint(folder)
            if verify:
                checkpoint.verify()
            summary = f"{format_bytes(sum(file['bytes'] for file in checkpoint.files))}{', intact' if verify else ''}"
        except BrokenCheckpoint as error:
            summary = f"broken: {error}"
        lines.append(f"{folder} ({summary})")
    return lines


def curve(values: list[float]) -> str:
    """Draw values as a line of at most WIDTH bars, each the mean of consecutive values."""
    count = min(WIDTH, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)


def age(seconds: float) -> str:
    """Return a duration in its largest unit: '3 min'."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())

"""List the runs: state, progress, loss, age, lineage."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from engine.train.run_folder import list_runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run `manta runs`."""
    parser = argparse.ArgumentParser(prog="manta runs", description=__doc__)
    parser.add_argument("--runs-dir", default="runs", help="where runs are kept (default: runs)")
    options = parser.parse_args(argv)
    runs = list_runs(Path(options.runs_dir))
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


def age(seconds: float) -> str:
    """Return a duration in its largest unit: '3 min'."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())

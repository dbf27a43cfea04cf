"""Show the lineage of a bundle: manta lineage NAME.

Data, training run, trial, evaluations, registered versions and deployments: as a tree in the terminal, and as a page with a
diagram in <runs_dir>/<name>/lineage.html. The exit code is 0 if the lineage is complete, 3 if anything is missing or was
changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import Config
from engine.errors import UserError
from jobs.entry import run_job

INCOMPLETE = 3


def show_lineage(config: Config) -> int:
    """Trace config.bundle, print the tree and write the page."""
    if not config.bundle:
        raise UserError("lineage needs a bundle: manta lineage NAME")
    from rich.console import Console
    from rich.markup import escape

    from engine.bundles.bundle import Bundle
    from engine.bundles.find import find_bundle
    from engine.bundles.lineage import trace_lineage
    from engine.bundles.registry import Registry
    from engine.evaluate.lineage_page import lineage_tree, write_lineage_page
    from engine.progress import console

    runs_dir = Path(config.runs_dir)
    bundle = Bundle.open(find_bundle(config.bundle, runs_dir, config.tracking_uri))
    lineage = trace_lineage(bundle, config.bundle, runs_dir, Registry(config.tracking_uri, config.registry_dir))
    Console(width=max(console.width, 160), soft_wrap=True, highlight=False).print(
        lineage_tree(lineage)
    )  # each node on one line
    for problem in lineage.all_problems():
        console.print(f"incomplete: {escape(problem)}")
    console.print(f"page  {write_lineage_page(config.run_dir / 'lineage.html', lineage)}")
    return INCOMPLETE if lineage.all_problems() else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job."""
    return run_job("lineage", show_lineage, argv, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())

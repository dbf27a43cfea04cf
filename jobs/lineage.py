"""Show where a bundle came from and where it went: manta lineage NAME.

Data, training, trial, evaluations, registered versions, endpoints: as a tree here, and as a page with a picture in
<runs_dir>/<name>/lineage.html. The exit code is 0 where the lineage is whole, 3 where something is lacking or was changed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import Config
from engine.errors import UserError
from jobs.entry import run_job

NOT_WHOLE = 3


def lineage(config: Config) -> int:
    """Trace config.bundle, show the tree and write the page."""
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
    life = trace_lineage(bundle, config.bundle, runs_dir, Registry(config.tracking_uri, config.registry_dir))
    Console(width=max(console.width, 160), soft_wrap=True, highlight=False).print(lineage_tree(life))  # a line a box
    for fault in life.all_problems():
        console.print(f"not whole: {escape(fault)}")
    console.print(f"page  {write_lineage_page(config.run_dir / 'lineage.html', life)}")
    return NOT_WHOLE if life.all_problems() else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return run_job("lineage", lineage, argv, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())

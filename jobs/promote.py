"""Make a bundle the champion: manta promote NAME.

It must verify (all hashes, and the golden outputs replayed), its lineage must be complete (data, run and parent, each found
by its hash), and it must be better than the current champion by the paired bootstrap on the test split of its own data, or
of those that data=... names; promote.reason='...' replaces the last check only, and is recorded. MLflow's registry keeps a
copy of the bundle.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from engine.errors import UserError
from jobs.entry import run_job, sets_data


def promote(config: Config, data_given: bool) -> None:
    """Promote config.bundle. Raises UserError for the first check that fails."""
    if not config.bundle:
        raise UserError("promote needs a bundle: manta promote NAME")
    from engine.evaluate.promote import promote

    promote(config, data_given)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_job("promote", lambda config: promote(config, sets_data(words)), words, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())

"""Compare two bundles on the same examples, by the paired bootstrap: manta compare A B.

The examples are the test split of the data that A was trained on, and B must be trained on the same data; or they are
those that data=... names. Exit codes: 0 A is better, 3 A is worse, 4 no significant difference; 2 a mistake in the
command, as for all commands.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import Config
from engine.errors import UserError
from jobs.entry import run_job, sets_data

EXIT_CODES = {"better": 0, "worse": 3, "not told apart": 4}  # by the comparison's verdict


def compare(config: Config, data_given: bool) -> int:
    """Compare config.bundle with config.evaluate.against; return the exit code of the verdict."""
    names = [name for name in (config.bundle, config.evaluate.against) if name]
    if len(names) < 2:
        raise UserError("compare needs two bundles: manta compare A B")
    from engine.bundles.bundle import Bundle
    from engine.bundles.find import find_bundle
    from engine.evaluate.comparison import check_comparable, check_same_data, with_training_data
    from engine.evaluate.job import run_evaluation

    a, b = (Bundle.open(find_bundle(name, Path(config.runs_dir), config.tracking_uri)) for name in names)
    check_comparable(a, b)
    if not data_given:
        check_same_data(a, b, names)
        config = with_training_data(config, a, names[0])
    comparison = run_evaluation(config)
    assert comparison is not None
    return EXIT_CODES[comparison.verdict]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the job."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_job("compare", lambda config: compare(config, sets_data(words)), words, ("bundle", "evaluate.against"))


if __name__ == "__main__":
    sys.exit(main())

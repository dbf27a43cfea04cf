"""Compare two bundles on the same examples, by the paired bootstrap: manta compare A B.

The examples are the test split of the data that A was trained on, and B must be trained on the same; or they are those
that data=... names. The exit code says how A does against B: 0 it is better, 3 it is worse, 4 they are not told apart;
2 is a mistake in the command, as of any other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import Config
from engine.errors import UserError
from jobs.entry import run_job, sets_data

CODES = {"better": 0, "worse": 3, "not told apart": 4}


def compare(config: Config, data_given: bool) -> int:
    """Compare; return the exit code of the verdict."""
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
    found = run_evaluation(config)
    assert found is not None
    return CODES[found.verdict]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_job("compare", lambda config: compare(config, sets_data(words)), words, ("bundle", "evaluate.against"))


if __name__ == "__main__":
    sys.exit(main())

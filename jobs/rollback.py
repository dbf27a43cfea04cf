"""Make the champion before the present one the champion again, byte for byte: manta rollback NAME."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from engine.errors import UserError
from jobs.entry import start


def rollback(config: Config) -> None:
    """Go back, and say to which version."""
    if not config.bundle:
        raise UserError("rollback needs a registered name: manta rollback NAME")
    from engine.evaluate.promote import roll_back

    roll_back(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("rollback", rollback, argv, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())

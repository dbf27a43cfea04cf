"""Go back, byte for byte: manta rollback NAME.

The champion before the present one becomes the champion again. With cluster=auto the endpoint there goes back to the version
of NAME before, or ends what it tries, within seconds; the champion then moves only if it is what was taken off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from engine.errors import UserError
from jobs.entry import ray_session, start


def rollback(config: Config) -> None:
    """Go back, and say to which version."""
    if not config.bundle:
        raise UserError("rollback needs a registered name, or one that is served: manta rollback NAME")
    from engine.evaluate.promote import is_champion
    from engine.evaluate.promote import roll_back as champion_back

    if config.cluster.address == "local":
        champion_back(config)
        return
    from engine.progress import console
    from engine.serve.deploy import roll_back as endpoint_back

    with ray_session(config):
        gone, answers = endpoint_back(config, config.bundle)
    console.print(f"the endpoint answers {config.bundle} with {answers[:12]} again, and no more with {gone[:12]}")
    if is_champion(config, gone):
        champion_back(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("rollback", rollback, argv, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())

"""Roll back to the previous version, byte for byte: manta rollback NAME.

The previous champion becomes the champion again. With cluster=auto the endpoint there ends its rollout of NAME, or else
returns to the previous version, within seconds; the champion then changes only if it is the version that was withdrawn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from engine.errors import UserError
from jobs.entry import ray_session, run_job


def rollback(config: Config) -> None:
    """Roll back, and print the versions."""
    if not config.bundle:
        raise UserError("rollback needs a registered or served name: manta rollback NAME")
    from engine.evaluate.promote import is_champion
    from engine.evaluate.promote import roll_back as roll_back_champion

    if config.cluster.address == "local":
        roll_back_champion(config)
        return
    from engine.progress import console
    from engine.serve.deploy import roll_back as roll_back_endpoint

    with ray_session(config):
        withdrawn, stable = roll_back_endpoint(config, config.bundle)
    console.print(f"the endpoint serves {config.bundle} with {stable[:12]} again, no longer with {withdrawn[:12]}")
    if is_champion(config, withdrawn):
        roll_back_champion(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return run_job("rollback", rollback, argv, ("bundle",))


if __name__ == "__main__":
    sys.exit(main())

"""Put a bundle behind Ray Serve."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import ray_session, start


def deploy(config: Config) -> None:
    """Serve the bundle until Ctrl-C, or leave it up with serve.detach=true."""
    from engine.serve.deploy import serve_until_stopped

    with ray_session(config):
        serve_until_stopped(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("deploy", deploy, argv)


if __name__ == "__main__":
    sys.exit(main())

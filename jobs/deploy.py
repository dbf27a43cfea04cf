"""Serve a bundle with Ray Serve, or change what a running endpoint serves without losing a request.

Where an endpoint is up on the cluster, the bundle becomes a new version of the name, rolled out by serve.strategy.
The exit code is 3 where the new version was withdrawn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import ray_session, run_job


def deploy(config: Config) -> int:
    """Serve the bundle until Ctrl-C, or leave it up with serve.detach=true; with serve.export, write configs instead."""
    if config.serve.export:
        from engine.serve.export import export

        return export(config)
    from engine.serve.deploy import serve_until_stopped

    with ray_session(config):
        return serve_until_stopped(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return run_job("deploy", deploy, argv)


if __name__ == "__main__":
    sys.exit(main())

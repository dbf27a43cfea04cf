"""Start one Ray node on loopback: `ray start` with its own arguments.

Run as a script by `cluster.local`. Ray listens on 127.0.0.1 only when RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is 0, and then
refuses a second node; here it doesn't, while the node's processes still inherit the 0.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run `ray start` with the arguments of the command line; ends the process."""
    from ray._private import ray_constants, services
    from ray.scripts.scripts import start

    ray_constants.ENABLE_RAY_CLUSTER = True
    services.get_node_ip_address = lambda address=None: "127.0.0.1"
    start.main(sys.argv[1:], prog_name="ray start")


if __name__ == "__main__":
    main()

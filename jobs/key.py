"""API keys of an endpoint: manta key new name=alice key.tokens_per_minute=100000 key.days=90, key list, key revoke name=alice.

A new key is shown once; serve.keys_file stores its hash. A running endpoint applies a change within about a second; one
that was started without keys, at its next start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import run_job


def key(config: Config) -> None:
    """Create, list or revoke keys."""
    from engine.serve.http.api_keys import new_key, revoke_key

    options, file = config.key, config.keys_file
    if options.action == "new":
        secret, _ = new_key(file, config.name, options.requests_per_minute, options.tokens_per_minute, options.days)
        print(f"key '{config.name}', stored as a hash in {file} and shown only now:", file=sys.stderr)
        print(secret)
    elif options.action == "revoke":
        revoke_key(file, config.name)
        print(f"key '{config.name}' is revoked")
    else:
        list_keys(config)


def list_keys(config: Config) -> None:
    """Print the keys, oldest first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from engine.serve.http.api_keys import read_keys

    keys = read_keys(config.keys_file)
    if not keys:
        print(f"there is no key in {config.keys_file} yet: manta key new name=ALICE")
        return
    table = Table(
        "name", "state", "requests/min", "tokens/min", "created", "expires", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    for api_key in keys:
        requests, tokens = (f"{n:,}" if n else "any" for n in (api_key.requests_per_minute, api_key.tokens_per_minute))
        table.add_row(
            api_key.name, api_key.state(time.time()), requests, tokens, date(api_key.created), date(api_key.expires)
        )
    Console().print(table)


def date(timestamp: float | None) -> str:
    """Return the date of a time in seconds since 1970; "never" for None."""
    return "never" if timestamp is None else time.strftime("%Y-%m-%d", time.localtime(timestamp))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return run_job("key", key, argv, ("key.action", "name"))


if __name__ == "__main__":
    sys.exit(main())

"""Bearer keys of an endpoint: manta key new name=alice key.tokens_per_minute=100000 key.days=90, key list, key revoke name=alice.

A new key is shown once; what is kept, in serve.keys_file, is its hash. An endpoint that runs takes up a change within a
second or so, or at its start where it had no keys.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from engine.config import Config
from jobs.entry import start


def key(config: Config) -> None:
    """Make, list or revoke."""
    from engine.serve.http.api_keys import new_key, revoke_key

    asked, file = config.key, config.keys_file
    if asked.action == "new":
        secret, _ = new_key(file, config.name, asked.requests_per_minute, asked.tokens_per_minute, asked.days)
        print(f"key '{config.name}', kept hashed in {file} and shown only now:", file=sys.stderr)
        print(secret)
    elif asked.action == "revoke":
        revoke_key(file, config.name)
        print(f"key '{config.name}' is revoked")
    else:
        show(config)


def show(config: Config) -> None:
    """Print the keys, the latest last."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from engine.serve.http.api_keys import read_keys

    keys = read_keys(config.keys_file)
    if not keys:
        print(f"there is no key in {config.keys_file} yet: manta key new name=ALICE")
        return
    table = Table("name", "state", "requests/min", "tokens/min", "made", "ends", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for it in keys:
        requests, tokens = (f"{n:,}" if n else "any" for n in (it.requests_per_minute, it.tokens_per_minute))
        table.add_row(it.name, it.state(time.time()), requests, tokens, day(it.created), day(it.expires))
    Console().print(table)


def day(moment: float | None) -> str:
    """Return the date of a time in seconds since 1970."""
    return "never" if moment is None else time.strftime("%Y-%m-%d", time.localtime(moment))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the command line asks for."""
    return start("key", key, argv, ("key.action", "name"))


if __name__ == "__main__":
    sys.exit(main())

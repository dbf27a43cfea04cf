"""Moving an alias such as champion, and taking it back: what it points at now, and what it pointed at before.

MLflow sets an alias without asking what it was, so two who promote at once would both believe that they won. But it gives
numbers to the versions of a model one by one. So each move is first written down as a version of a second registered
model, NAME.ALIAS, with the champion that it starts from. It counts only if that still is the champion of the moves with
lower numbers; then the alias is set. These records are also how a rollback knows what was before.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.bundles.registry import Registry, all_pages, retry_on_conflict
from engine.errors import UserError

APPLY_TIMEOUT_S = 3.0  # seconds that a move which is written down may take to set the alias before another finishes it


@dataclass(frozen=True)
class Move:
    """One move of an alias, as it was written down."""

    number: int
    kind: str  # promote; rollback; found: somebody moved the alias outside of Manta
    from_version: int | None  # version that the alias pointed at when this move was decided
    to_version: int | None
    id: str = ""
    reason: str = ""
    by: str = ""
    time_ms: int = 0
    is_applied: bool = False  # the alias was set


def effective_moves(moves: Sequence[Move]) -> list[Move]:
    """Return the moves that made the champions in force, the present one last; a rollback takes the last one off.

    A move that starts from another version than the champion of its turn came too late and doesn't count.
    """
    held: list[Move] = []
    for move in sorted(moves, key=lambda m: m.number):
        if is_valid(move, held):
            held = held[:-1] if move.kind == "rollback" else [*held, move]
    return held


def is_valid(move: Move, held: Sequence[Move]) -> bool:
    """Tell whether a move counts after those that hold."""
    if move.from_version != (held[-1].to_version if held else None):
        return False
    return move.kind != "rollback" or (len(held) > 1 and held[-2].to_version == move.to_version)


def last_valid_move(moves: Sequence[Move]) -> Move | None:
    """Return the last move that counts, a rollback too."""
    found, held = None, list[Move]()
    for move in sorted(moves, key=lambda m: m.number):
        if is_valid(move, held):
            held = held[:-1] if move.kind == "rollback" else [*held, move]
            found = move
    return found


class Alias:
    """One alias of one registered name, and the record of its moves."""

    def __init__(self, registry: Registry, name: str, alias: str) -> None:
        """Take the registry, the registered name and the alias."""
        self.registry, self.name, self.alias = registry, name, alias
        self.record = f"{name}.{alias}"

    def current(self) -> int | None:
        """Return the version that the alias points at, after the record and MLflow were brought to agree."""
        deadline = time.monotonic() + APPLY_TIMEOUT_S
        while True:
            moves = self.moves()
            held, last, shown = effective_moves(moves), last_valid_move(moves), self._mlflow_version()
            if shown == (held[-1].to_version if held else None):
                return shown
            if last is None or last.is_applied or shown != last.from_version:
                break  # moved by hand, in MLflow's own pages for example
            if time.monotonic() > deadline:  # whoever wrote the move down has died before he set the alias
                self._apply()
                return self.current()
            time.sleep(0.1)
        self._record_move("found", held[-1].to_version if held else None, shown, "the alias was moved outside of Manta")
        self._apply()
        return self.current()

    def move(self, kind: str, start: int | None, to: int, reason: str) -> Move:
        """Move the alias from `start` to `to`. Raises UserError where another move came in between."""
        made = self._record_move(kind, start, to, reason)
        moves = self.moves()
        before = [move for move in moves if move.number < made.number]
        if not is_valid(made, effective_moves(before)):
            held = effective_moves(before)[-1:]
            now = f"{self.name}/{held[0].to_version}" if held else "none"
            who = f" (moved by {held[0].by}: {held[0].reason})" if held else ""
            raise UserError(
                f"another promotion came first: {self.alias} of {self.name} is {now} now{who}; nothing was changed, try again"
            )
        self._apply()
        return made

    def roll_back(self, reason: str) -> tuple[int, int]:
        """Restore the version before; return (from, to). Raises UserError where there is none, or its bytes aren't whole."""
        start = self.current()
        held = effective_moves(self.moves())
        if start is None or len(held) < 2 or held[-2].to_version is None:
            raise UserError(f"there is nothing before the present {self.alias} of {self.name} to go back to")
        to = held[-2].to_version
        version = self.registry.lookup(f"{self.name}/{to}")
        if version is None:
            raise UserError(f"{self.name}/{to} was the {self.alias} before, and is gone from the registry")
        self.registry.fetch(version).verify()
        self.move("rollback", start, to, reason)
        return start, to

    def moves(self) -> list[Move]:
        """Return all moves that were written down, in their order."""
        client = self.registry.client
        found = all_pages(lambda token: client.search_model_versions(f"name = '{self.record}'", page_token=token))
        moves = [
            Move(
                int(one.version), one.tags["manta.kind"], _number(one.tags["manta.from"]), _number(one.tags["manta.to"]),
                one.tags["manta.id"], one.tags["manta.reason"], one.tags["manta.by"], one.creation_timestamp, "manta.done" in one.tags,
            )
            for one in found
            if "manta.kind" in one.tags
        ]  # fmt: skip
        return sorted(moves, key=lambda move: move.number)

    def _record_move(self, kind: str, start: int | None, to: int | None, reason: str) -> Move:
        """Write a move down; where an answer of the server was lost and asked for again, the first record is the move."""
        client = self.registry.client
        self.registry.create_name(self.record, {"manta.moves_of": self.name})
        made = Move(0, kind, start, to, uuid.uuid4().hex, reason, os.environ.get("USER") or f"user {os.getuid()}")
        tags = {"manta.kind": kind, "manta.from": str(start or ""), "manta.to": str(to or ""), "manta.id": made.id,
                "manta.reason": reason or "none given", "manta.by": made.by}  # fmt: skip
        source = f"models:/{self.name}/{to or start}"
        retry_on_conflict(lambda: client.create_model_version(self.record, source=source, tags=tags))
        return next(move for move in self.moves() if move.id == made.id)

    def _apply(self) -> None:
        """Set the alias as the record says, until the record has not grown meanwhile: so the last move's word stays."""
        while True:
            moves = self.moves()
            held, last = effective_moves(moves), last_valid_move(moves)
            self._point_at(held[-1].to_version if held else None)
            if last and len(self.moves()) == len(moves):
                done = partial(self.registry.client.set_model_version_tag, self.record, str(last.number), "manta.done")
                retry_on_conflict(partial(done, "true"))
                return

    def _point_at(self, to: int | None) -> None:
        client = self.registry.client
        if to is None:
            retry_on_conflict(partial(client.delete_registered_model_alias, self.name, self.alias))
        else:
            retry_on_conflict(partial(client.set_registered_model_alias, self.name, self.alias, str(to)))

    def _mlflow_version(self) -> int | None:
        from mlflow.exceptions import MlflowException

        try:
            aliases: dict[str, Any] = self.registry.client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return int(aliases[self.alias]) if self.alias in aliases else None


def _number(word: str) -> int | None:
    return int(word) if word else None

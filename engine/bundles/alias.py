"""Aliases such as champion: which version an alias points at, how it is moved, and what it pointed at before.

MLflow sets an alias unconditionally, so two concurrent promotions would both appear to succeed. But it numbers the versions
of a model one by one. So each move is first recorded as a version of a second registered model, NAME.ALIAS, together with
the champion that it starts from. A move is valid only if that is still the champion after the valid moves with lower
numbers; then the alias is set. A rollback reads the previous champion from these records.
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

APPLY_TIMEOUT_S = 3.0  # seconds that another process gets to set the alias after it has recorded a move


@dataclass(frozen=True)
class Move:
    """One recorded move of an alias."""

    number: int
    kind: str  # promote; rollback; found: the alias was moved outside of Manta
    from_version: int | None  # that the alias pointed at when this move was decided
    to_version: int | None
    id: str = ""
    reason: str = ""
    by: str = ""
    time_ms: int = 0
    is_applied: bool = False  # whether the alias was set


def effective_moves(moves: Sequence[Move]) -> list[Move]:
    """Return the moves that made the champions, the current one last; a rollback removes the last one.

    A move that starts from another version than the champion at its number came too late and is ignored.
    """
    effective: list[Move] = []
    for move in sorted(moves, key=lambda move: move.number):
        if is_valid(move, effective):
            effective = effective[:-1] if move.kind == "rollback" else [*effective, move]
    return effective


def is_valid(move: Move, effective: Sequence[Move]) -> bool:
    """Tell whether a move starts from the current champion, and if it is a rollback, leads to the one before."""
    if move.from_version != (effective[-1].to_version if effective else None):
        return False
    return move.kind != "rollback" or (len(effective) > 1 and effective[-2].to_version == move.to_version)


def last_valid_move(moves: Sequence[Move]) -> Move | None:
    """Return the last valid move, including rollbacks."""
    last, effective = None, list[Move]()
    for move in sorted(moves, key=lambda move: move.number):
        if is_valid(move, effective):
            effective = effective[:-1] if move.kind == "rollback" else [*effective, move]
            last = move
    return last


class Alias:
    """One alias of one registered name, and the records of its moves."""

    def __init__(self, registry: Registry, name: str, alias: str) -> None:
        """Use `alias` of the registered `name`."""
        self.registry, self.name, self.alias = registry, name, alias
        self.record = f"{name}.{alias}"

    def current(self) -> int | None:
        """Return the version that the alias points at, after reconciling the records with MLflow."""
        deadline = time.monotonic() + APPLY_TIMEOUT_S
        while True:
            moves = self.moves()
            effective, last, actual = effective_moves(moves), last_valid_move(moves), self._mlflow_version()
            if actual == (effective[-1].to_version if effective else None):
                return actual
            if last is None or last.is_applied or actual != last.from_version:
                break  # moved outside of Manta, in MLflow's UI for example
            if time.monotonic() > deadline:  # the process that recorded the move died before it set the alias
                self._apply()
                return self.current()
            time.sleep(0.1)
        self._record_move(
            "found", effective[-1].to_version if effective else None, actual, "the alias was moved outside of Manta"
        )
        self._apply()
        return self.current()

    def move(self, kind: str, from_version: int | None, to_version: int, reason: str) -> Move:
        """Move the alias. Raises UserError if another move came first."""
        recorded = self._record_move(kind, from_version, to_version, reason)
        before = effective_moves([move for move in self.moves() if move.number < recorded.number])
        if not is_valid(recorded, before):
            now = f"{self.name}/{before[-1].to_version}" if before else "none"
            who = f" (moved by {before[-1].by}: {before[-1].reason})" if before else ""
            raise UserError(
                f"another promotion came first: {self.alias} of {self.name} is {now} now{who}; nothing was changed, try again"
            )
        self._apply()
        return recorded

    def roll_back(self, reason: str) -> tuple[int, int]:
        """Move the alias back to the previous version; return (from, to).

        Raises UserError if there is no previous version, or its files are missing or were changed.
        """
        from_version = self.current()
        effective = effective_moves(self.moves())
        if from_version is None or len(effective) < 2 or effective[-2].to_version is None:
            raise UserError(f"there is nothing before the current {self.alias} of {self.name} to roll back to")
        to_version = effective[-2].to_version
        version = self.registry.lookup(f"{self.name}/{to_version}")
        if version is None:
            raise UserError(f"{self.name}/{to_version}, the previous {self.alias}, is gone from the registry")
        self.registry.fetch(version).verify()
        self.move("rollback", from_version, to_version, reason)
        return from_version, to_version

    def moves(self) -> list[Move]:
        """Return all recorded moves, in order."""
        client = self.registry.client
        records = all_pages(lambda token: client.search_model_versions(f"name = '{self.record}'", page_token=token))
        moves = [
            Move(
                number=int(record.version),
                kind=record.tags["manta.kind"],
                from_version=_optional_int(record.tags["manta.from"]),
                to_version=_optional_int(record.tags["manta.to"]),
                id=record.tags["manta.id"],
                reason=record.tags["manta.reason"],
                by=record.tags["manta.by"],
                time_ms=record.creation_timestamp,
                is_applied="manta.done" in record.tags,
            )
            for record in records
            if "manta.kind" in record.tags
        ]
        return sorted(moves, key=lambda move: move.number)

    def _record_move(self, kind: str, from_version: int | None, to_version: int | None, reason: str) -> Move:
        """Record a move. If the server's response is lost and the request repeated, the first record is the move."""
        client = self.registry.client
        self.registry.create_name(self.record, {"manta.moves_of": self.name})
        move_id, by = uuid.uuid4().hex, os.environ.get("USER") or f"user {os.getuid()}"
        tags = {
            "manta.kind": kind,
            "manta.from": str(from_version or ""),
            "manta.to": str(to_version or ""),
            "manta.id": move_id,
            "manta.reason": reason or "none given",
            "manta.by": by,
        }
        source = f"models:/{self.name}/{to_version or from_version}"
        retry_on_conflict(lambda: client.create_model_version(self.record, source=source, tags=tags))
        return next(move for move in self.moves() if move.id == move_id)

    def _apply(self) -> None:
        """Set the alias as the records say; repeat until no move was added meanwhile, so that the last move prevails."""
        while True:
            moves = self.moves()
            effective, last = effective_moves(moves), last_valid_move(moves)
            self._set_alias(effective[-1].to_version if effective else None)
            if last and len(self.moves()) == len(moves):
                set_tag = partial(
                    self.registry.client.set_model_version_tag, self.record, str(last.number), "manta.done"
                )
                retry_on_conflict(partial(set_tag, "true"))
                return

    def _set_alias(self, version: int | None) -> None:
        client = self.registry.client
        if version is None:
            retry_on_conflict(partial(client.delete_registered_model_alias, self.name, self.alias))
        else:
            retry_on_conflict(partial(client.set_registered_model_alias, self.name, self.alias, str(version)))

    def _mlflow_version(self) -> int | None:
        """Return the version that MLflow's alias points at."""
        from mlflow.exceptions import MlflowException

        try:
            aliases: dict[str, Any] = self.registry.client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return int(aliases[self.alias]) if self.alias in aliases else None


def _optional_int(text: str) -> int | None:
    return int(text) if text else None

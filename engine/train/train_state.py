"""The train state: everything besides weights and optimizer state that affects the next step. Resuming needs no more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.data.order import add_hashes

INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_WINDOW = 1000  # updates without an overflow after which the loss scale doubles
OLD_NAMES = {"passed": "skipped_data_steps", "stale": "evals_since_best"}  # of fields, in checkpoints of older versions


@dataclass(frozen=True)
class TrainState:
    """The progress of a run after some number of steps."""

    step: int = 0  # optimizer steps done, skipped ones included
    samples: int = 0  # samples seen
    tokens: int = 0  # tokens seen, without padding
    skipped: int = 0  # steps that left the weights unchanged (see guards.py)
    skipped_in_a_row: int = 0  # skipped steps since the last good step
    recent: tuple[float, ...] = ()  # losses of the last good steps, for spike detection
    skipped_data_steps: int = 0  # steps of the data order that rollbacks have skipped
    rollbacks: int = 0
    best: float | None = None  # best value so far of the objective's metric on the validation split
    best_step: int = 0  # the step of that value
    evals_since_best: int = 0  # validations since then
    loss_scale: float | None = None  # fp16: factor on the loss
    steady: int = 0  # fp16: updates since the loss scale last changed
    samples_hash: int = 0  # sum modulo 2**64 of the hashes of all sample ids seen, on any rank

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> TrainState:
        """Read `asdict` of a state from JSON, also one that an older version wrote."""
        fields = {OLD_NAMES.get(name, name): value for name, value in tree.items()}
        return cls(**fields | {"recent": tuple(fields.get("recent", ()))})

    @property
    def data_step(self) -> int:
        """The step of the data order that comes next."""
        return self.step + self.skipped_data_steps

    @property
    def updates(self) -> int:
        """The number of times that the optimizer has changed the weights."""
        return self.step - self.skipped

    def after_step(
        self, samples: int, tokens: int, ids_hash: int, skipped: bool = False, recent: tuple[float, ...] = ()
    ) -> TrainState:
        """Return the state after one more step; `recent` replaces the recent losses unless the step was skipped."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            skipped=self.skipped + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            recent=self.recent if skipped else recent,
            samples_hash=add_hashes([self.samples_hash, ids_hash]),
        ).with_next_loss_scale(skipped)

    def with_next_loss_scale(self, skipped: bool) -> TrainState:
        """Return the state with the next loss scale: halved after an overflow, doubled after LOSS_SCALE_WINDOW updates.

        Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2.
        """
        if self.loss_scale is None:
            return self
        if skipped:
            return replace(self, loss_scale=max(1.0, self.loss_scale / 2), steady=0)
        if self.steady + 1 == LOSS_SCALE_WINDOW:
            return replace(self, loss_scale=self.loss_scale * 2, steady=0)
        return replace(self, steady=self.steady + 1)

    def after_rollback(self, good: TrainState) -> TrainState:
        """Return the checkpoint's state `good`, with the data of all steps up to the failed one skipped."""
        return replace(good, skipped_data_steps=self.data_step + 1 - good.step, rollbacks=self.rollbacks + 1)

    def after_validation(self, value: float, mode: str) -> TrainState:
        """Return the state after a validation result; `mode` says whether "min" or "max" is best."""
        if self.best is None or (value < self.best if mode == "min" else value > self.best):
            return replace(self, best=value, best_step=self.step, evals_since_best=0)
        return replace(self, evals_since_best=self.evals_since_best + 1)

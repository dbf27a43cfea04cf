"""All that resume needs beside the weights and the optimizer: what isn't here must not matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.data.order import add_hashes

INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_WINDOW = 1000  # updates


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    samples: int = 0  # samples seen
    tokens: int = 0  # tokens seen, padding left out
    skipped: int = 0  # of these steps, how many left the weights as they were (see guards.py)
    skipped_in_a_row: int = 0  # of these, how many since the last good step
    recent: tuple[float, ...] = ()  # losses of the last good steps, for the spike guard
    skipped_data_steps: int = 0  # steps of the data order that roll-backs have passed over
    rollbacks: int = 0
    best: float | None = None  # the best value so far of the objective's metric on the validation split
    best_step: int = 0  # the step that had it
    evals_since_best: int = 0  # validations since then
    loss_scale: float | None = None  # fp16: what the loss is multiplied by
    steady: int = 0  # fp16: updates since it changed
    samples_hash: int = 0  # sum modulo 2**64 of the hashes of all sample ids seen, whatever rank saw them

    @property
    def data_step(self) -> int:
        """Which step of the data order comes next."""
        return self.step + self.skipped_data_steps

    @property
    def updates(self) -> int:
        """How often the optimizer has changed the weights."""
        return self.step - self.skipped

    def after_step(
        self, samples: int, tokens: int, ids_hash: int, skipped: bool = False, recent: tuple[float, ...] = ()
    ) -> TrainState:
        """Return the state one step on; `recent` as it is after a good step."""
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
        """Return the state with the loss scale of the next step: half after an overflow, twice after RESCALE_AFTER updates.

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
        """Return the state of the good checkpoint, past the data of all steps up to the one that comes next here."""
        return replace(good, skipped_data_steps=self.data_step + 1 - good.step, rollbacks=self.rollbacks + 1)

    def after_validation(self, value: float, mode: str) -> TrainState:
        """Return the state after a validation that gave `value`, of which the `mode` ("min" or "max") is best."""
        if self.best is None or (value < self.best if mode == "min" else value > self.best):
            return replace(self, best=value, best_step=self.step, evals_since_best=0)
        return replace(self, evals_since_best=self.evals_since_best + 1)

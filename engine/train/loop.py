"""The one step loop: pre-training, fine-tuning and a sweep's trial. No Ray and no Hydra in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch

from engine.config import Config
from engine.data.order import Order, hash_hex, ids_hash
from engine.errors import UserError
from engine.objectives.contract import Batch, Objective, Samples, concat_scores
from engine.train.checkpoint import CheckpointWriter, latest_whole, remove, restore, step_folders
from engine.train.process_group import Group
from engine.train.guards import StopRun, RollBack, SkipStep, decide, check_loss, check_grad_norm, append_recent_loss
from engine.train.meter import Meter
from engine.train.run_folder import RunFolder
from engine.train.schedule import learning_rate
from engine.train.sequence_parallel import SequenceParallel
from engine.train.train_state import TrainState
from engine.train.watchdog import Heartbeat
from engine.train.zero import ZeroModel

Metrics = dict[str, Any]


@dataclass
class Run:
    """One rank's view of a training run."""

    config: Config
    group: Group
    objective: Objective
    model: ZeroModel
    samples: Samples
    validation: Samples | None  # None: the data has no validation split
    order: Order
    writer: CheckpointWriter
    about: dict[str, Any]  # what a checkpoint's manifest says of the run
    log: Callable[[Metrics], None]
    meter: Meter
    sequence: SequenceParallel
    state: TrainState = field(default_factory=TrainState)
    saved_step: int = -1
    heart: Heartbeat = field(default_factory=Heartbeat)
    wants_save: Callable[[], bool] = lambda: False  # whether this rank was asked for a checkpoint at once
    save_asked: bool = False  # whether any rank was, before the last step
    notes: Metrics = field(default_factory=dict)  # what the next logged line says beside its figures

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Make a micro-batch of samples, or of this rank's part of each, on the rank's device."""
        return self.sequence.part(self.objective.collate(samples).to(self.group.device))

    def ended(self) -> bool:
        """Whether no step is left to take."""
        train = self.config.train
        tired = train.patience is not None and self.state.evals_since_best >= train.patience
        return tired or self.state.step >= train.max_steps

    def save(self) -> None:
        """Begin to write a checkpoint of this moment, unless there is one."""
        if self.saved_step != self.state.step:
            self.writer.save(self.model.fragments(self.group.rank), self.state, self.about)
            self.saved_step = self.state.step

    def handle_save_status(self, asked: int, failed: int) -> None:
        """Act on what the ranks told each other: so many were asked for a checkpoint, so many could not write theirs."""
        self.save_asked = asked > 0
        if not failed:
            return
        fault = self.writer.clear_failed(self.group)
        if self.config.train.on_failed_save == "stop":
            raise UserError(fault)
        self.log_event("save_fault", fault)

    def log_event(self, name: str, text: str) -> None:
        """Have the next logged line, and the person who follows the run, told of an event."""
        self.notes[name] = text
        if self.group.rank == 0:
            RunFolder(self.config.run_dir).tell(text)

    def wait_for_save(self) -> str:
        """Wait for the save under way, on all ranks at once; return what went wrong with it."""
        self.heart.slow()
        self.writer.wait()
        failed = self.group.sum_integers(int(self.writer.failed))[0]
        return self.writer.clear_failed(self.group) if failed else ""


def fit(run: Run) -> None:
    """Train from the run's state to its last step, or until train.patience is at its end."""
    train = run.config.train
    run.model.train()
    while not run.ended():
        metrics = train_step(run)
        if metrics is None:  # rolled back
            continue
        run.heart.slow(False)
        step = run.state.step
        if step == train.max_steps or (train.evaluate_every and step % train.evaluate_every == 0):
            metrics |= validate_and_track_best(run)
        best = train.keep_best and run.state.best_step == step
        due = (run.save_asked or step % train.checkpoint_every == 0) and not run.state.skipped_in_a_row
        if best or due or run.ended():
            run.meter.enter("checkpoint")
            run.save()
        run.log(metrics | run.meter.read())
    if fault := run.wait_for_save():
        raise UserError(fault)


def validate_and_track_best(run: Run) -> Metrics:
    """Validate, note how that compares with the best, and return what to log. Raises UserError for a metric that is no number."""
    run.meter.enter("evaluation")
    with run.model.averaged() if run.config.train.use_ema else nullcontext():
        found = validate(run)
    if wrong := [name for name, value in found.items() if not math.isfinite(value)]:
        raise UserError(
            f"the validation {wrong[0]} is {found[wrong[0]]} at step {run.state.step}: "
            f"use a lower optim.lr than {run.config.optim.lr:g}"
        )
    if run.objective.metric in found:
        run.state = run.state.after_validation(found[run.objective.metric], run.objective.mode)
    return {f"validation_{name}": value for name, value in found.items()}


def train_step(run: Run) -> Metrics | None:
    """Take one optimizer step over the global batch and return what to log of it; None where it ended in a roll-back."""
    run.meter.enter("data")
    state = run.state
    run.model.loss_scale = state.loss_scale
    ids = run.order.samples(state.data_step)
    batches, seen = collate_share(run, ids, run.order.draws(state.data_step))
    run.meter.enter("forward")
    batches = run.objective.before_step(run.model, batches, run.group)  # type: ignore[arg-type]

    run.meter.enter("communication")
    # The loss is a sum over the global batch divided by its count, for any split among ranks and micro-batches.
    count, tokens, new_hash, asked, failed = run.group.sum_integers(
        sum(batch.count for batch, weight in batches if weight),
        sum(batch.tokens for batch, weight in batches if weight),
        ids_hash(seen),
        int(run.wants_save()),
        int(run.writer.failed),
    )
    run.handle_save_status(asked, failed)
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.group.device)
    for batch, weight in batches:
        run.heart.beat()
        run.meter.enter("forward")
        loss = run.objective.loss(run.model, batch)  # type: ignore[arg-type]
        run.meter.enter("backward")
        run.model.backward(loss.sum * (weight / count))
        loss_sum += loss.sum.detach() * weight
    run.meter.enter("communication")
    loss_value = float(run.group.sum(loss_sum)) / count

    rate, grad_norm, fault = optimizer_step(run, loss_value)
    decision = decide(fault, state, run.config.train)
    if isinstance(decision, StopRun):
        stop_run(run, decision.reason)
    if isinstance(decision, RollBack):
        roll_back(run, decision.reason)
        return None

    skipped = isinstance(decision, SkipStep)
    recent = append_recent_loss(state.recent, loss_value, run.config.train)
    run.state = state.after_step(len(ids), tokens, new_hash, skipped, recent)
    run.meter.count(tokens)
    notes, run.notes = run.notes, {}
    return {
        "step": run.state.step,
        "loss": None if skipped else loss_value,
        "tokens": run.state.tokens,
        "lr": rate,
        "grad_norm": None if skipped else grad_norm,
        "skipped": run.state.skipped,
        "rollbacks": run.state.rollbacks,
        "passed": run.state.skipped_data_steps,
        "samples_hash": hash_hex(run.state.samples_hash),
        "time": time.time(),
        **({"fault": fault} if fault else {}),
        **notes,
    }


def optimizer_step(run: Run, loss: float) -> tuple[float, float, str]:
    """Update the weights unless the loss forbids it; return the rate, the gradient norm, and what is wrong, if anything."""
    if run.writer.copying:
        run.meter.enter("checkpoint")
        run.writer.hold()
    run.meter.enter("optimizer")
    rate = learning_rate(run.config, run.state.step)
    if fault := check_loss(loss, run.state.recent, run.config.train):
        run.model.discard()
        return rate, math.nan, fault
    grad_norm = run.model.step(rate)
    return rate, grad_norm, check_grad_norm(grad_norm)


def roll_back(run: Run, reason: str) -> None:
    """Go back to the last good checkpoint, past the data of the steps since then. Raises UserError where there is none."""
    run.wait_for_save()
    good = latest_whole(RunFolder(run.config.run_dir), run.group, good=True)
    if good is None:
        stop_run(run, f"{reason}, and there is no good checkpoint to go back to")
    restore(run.model, good, run.group.rank)
    if run.group.rank == 0:
        for folder in step_folders(run.writer.folder):
            if folder > good.folder:
                remove(folder)
    run.group.barrier()
    run.log_event("rolled_back", f"from step {run.state.step + 1} back to step {good.state.step}: {reason}")
    run.state, run.saved_step = run.state.after_rollback(good.state), good.state.step


def stop_run(run: Run, reason: str) -> NoReturn:
    """Raise UserError with the reason and what might help."""
    raise UserError(
        f"step {run.state.step + 1}: {reason}: use a lower optim.lr than {run.config.optim.lr:g}, "
        "or look at the data of these steps"
    )


def collate_share(run: Run, ids: np.ndarray, draws: np.ndarray) -> tuple[list[tuple[Batch, float]], np.ndarray]:
    """Return this rank's micro-batches of a step, each with its weight (1, or 0), and the ids in them.

    Every rank makes equally many passes, as ZeRO asks; one that is short of samples takes part with weight 0. Of the ranks
    that share sequences, the first counts the ids.
    """
    micro, rank, world = run.config.micro_batch, run.sequence.share, run.sequence.shares
    batches: list[tuple[Batch, float]] = []
    seen = []
    for first in range(0, len(ids), micro * world):
        places = range(len(ids))[first + rank * micro : first + (rank + 1) * micro]
        mine = ids[places.start : places.stop]
        shown = [run.samples[ids[place]] | {"draw": draws[place]} for place in places or range(1)]
        batches.append((run.collate(shown), float(len(mine) > 0)))
        seen.append(mine if run.sequence.rank == 0 else mine[:0])
    return batches, np.concatenate(seen)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Return the objective's metrics on the validation split, the same for any number of ranks."""
    if run.validation is None:
        return {}
    run.heart.slow()  # its first time may compile
    micro, rank, world = run.config.micro_batch, run.sequence.share, run.sequence.shares
    size = len(run.validation)
    count = min(size, run.config.train.evaluate_samples or size)
    ids = np.arange(count) * size // count  # spread evenly: neighbours come from one file
    run.model.train(False)
    parts = []
    for first in range(0, len(ids), micro * world):
        run.heart.beat()
        mine = ids[first + rank * micro : first + (rank + 1) * micro]
        batch = run.collate([run.validation[i] | {"draw": i} for i in (mine if len(mine) else ids[:1])])
        scores = run.sequence.scores(run.objective.score(run.model, batch))  # type: ignore[arg-type]
        if len(mine) and scores:
            parts.append(scores)
    run.model.train()
    # A rank without a single sample of its own (more ranks than samples) has nothing to add.
    gathered = run.group.gather(concat_scores(parts) if parts else {})
    return run.objective.summarize(run.objective.finalize_scores(concat_scores(scores for scores in gathered if scores)))

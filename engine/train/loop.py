"""The step loop of pre-training, fine-tuning and sweep trials. Uses neither Ray nor Hydra."""

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
from engine.data.order import DataOrder, hash_hex, ids_hash
from engine.errors import UserError
from engine.objectives.contract import Batch, Objective, Samples, concat_scores
from engine.train.checkpoint import CheckpointWriter, latest_valid, remove_checkpoint, restore_model, step_folders
from engine.train.guards import RollBack, SkipStep, StopRun, append_recent_loss, check_grad_norm, check_loss, decide
from engine.train.meter import StepMeter
from engine.train.process_group import ProcessGroup
from engine.train.run_folder import RunFolder
from engine.train.schedule import learning_rate
from engine.train.sequence_parallel import SequenceParallel
from engine.train.train_state import TrainState
from engine.train.watchdog import Heartbeat
from engine.train.zero import ZeroModel

Metrics = dict[str, Any]


@dataclass
class TrainingRun:
    """A training run as one rank sees it."""

    config: Config
    group: ProcessGroup
    objective: Objective
    model: ZeroModel
    samples: Samples
    validation: Samples | None  # None: the data has no validation split
    order: DataOrder
    writer: CheckpointWriter
    checkpoint_info: dict[str, Any]  # written to each checkpoint's manifest
    log: Callable[[Metrics], None]
    meter: StepMeter
    sequence: SequenceParallel
    state: TrainState = field(default_factory=TrainState)
    saved_step: int = -1
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    is_save_requested: Callable[[], bool] = lambda: False  # whether this rank was asked to save a checkpoint now
    save_requested: bool = False  # whether any rank was, before the last step
    pending_events: Metrics = field(default_factory=dict)  # events for the next logged line

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Collate samples to a micro-batch on the rank's device; with sequence parallelism, to this rank's part of it."""
        return self.sequence.shard(self.objective.collate(samples).to(self.group.device))

    def is_finished(self) -> bool:
        """Whether the last step is done, or train.patience is exhausted."""
        train = self.config.train
        exhausted = train.patience is not None and self.state.evals_since_best >= train.patience
        return exhausted or self.state.step >= train.max_steps

    def save(self) -> None:
        """Start to write a checkpoint of the current step, unless it has one."""
        if self.saved_step != self.state.step:
            self.writer.save(self.model.fragments(self.group.rank), self.state, self.checkpoint_info)
            self.saved_step = self.state.step

    def handle_save_status(self, num_requested: int, num_failed: int) -> None:
        """Act on the numbers of ranks that were asked for a checkpoint, and that failed to write theirs."""
        self.save_requested = num_requested > 0
        if not num_failed:
            return
        fault = self.writer.clear_failure(self.group)
        if self.config.train.on_failed_save == "stop":
            raise UserError(fault)
        self.log_event("save_fault", fault)

    def log_event(self, name: str, text: str) -> None:
        """Add an event to the next logged line, and report it to the user."""
        self.pending_events[name] = text
        if self.group.rank == 0:
            RunFolder(self.config.run_dir).report_event(text)

    def wait_for_save(self) -> str:
        """Wait for the save in progress, on all ranks at once; return its error, or an empty string."""
        self.heartbeat.allow_slow()
        self.writer.wait()
        num_failed = self.group.all_reduce_ints(int(self.writer.has_failed))[0]
        return self.writer.clear_failure(self.group) if num_failed else ""


def fit(run: TrainingRun) -> None:
    """Train from the run's state to its last step, or until train.patience is exhausted."""
    train = run.config.train
    run.model.train()
    while not run.is_finished():
        metrics = train_step(run)
        if metrics is None:  # rolled back
            continue
        run.heartbeat.allow_slow(False)
        step = run.state.step
        if step == train.max_steps or (train.evaluate_every and step % train.evaluate_every == 0):
            metrics |= validate_and_track_best(run)
        best = train.keep_best and run.state.best_step == step
        due = (run.save_requested or step % train.checkpoint_every == 0) and not run.state.skipped_in_a_row
        if best or due or run.is_finished():
            run.meter.enter_phase("checkpoint")
            run.save()
        run.log(metrics | run.meter.end_step())
    if fault := run.wait_for_save():
        raise UserError(fault)


def validate_and_track_best(run: TrainingRun) -> Metrics:
    """Validate, update the best value in the train state, and return what to log. Raises UserError for a non-finite metric."""
    run.meter.enter_phase("evaluation")
    with run.model.ema_weights() if run.config.train.use_ema else nullcontext():
        metrics = validate(run)
    if non_finite := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise UserError(
            f"the validation {non_finite[0]} is {metrics[non_finite[0]]} at step {run.state.step}: "
            f"use a lower optim.lr than {run.config.optim.lr:g}"
        )
    if run.objective.metric in metrics:
        run.state = run.state.after_validation(metrics[run.objective.metric], run.objective.mode)
    return {f"validation_{name}": value for name, value in metrics.items()}


def train_step(run: TrainingRun) -> Metrics | None:
    """Take one optimizer step over the global batch and return what to log; None if it ended in a rollback."""
    run.meter.enter_phase("data")
    state = run.state
    run.model.loss_scale = state.loss_scale
    ids = run.order.sample_ids(state.data_step)
    batches, rank_ids = collate_rank_batches(run, ids, run.order.sample_seeds(state.data_step))
    run.meter.enter_phase("forward")
    batches = run.objective.before_step(run.model, batches, run.group)  # type: ignore[arg-type]

    run.meter.enter_phase("communication")
    # The loss is the sum over the global batch divided by its count, however ranks and micro-batches split it.
    count, tokens, new_hash, num_requested, num_failed = run.group.all_reduce_ints(
        sum(batch.count for batch, weight in batches if weight),
        sum(batch.tokens for batch, weight in batches if weight),
        ids_hash(rank_ids),
        int(run.is_save_requested()),
        int(run.writer.has_failed),
    )
    run.handle_save_status(num_requested, num_failed)
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.group.device)
    for batch, weight in batches:
        run.heartbeat.beat()
        run.meter.enter_phase("forward")
        loss = run.objective.loss(run.model, batch)  # type: ignore[arg-type]
        run.meter.enter_phase("backward")
        run.model.backward(loss.sum * (weight / count))
        loss_sum += loss.sum.detach() * weight
    run.meter.enter_phase("communication")
    loss_value = float(run.group.all_reduce(loss_sum)) / count

    lr, grad_norm, fault = optimizer_step(run, loss_value)
    decision = decide(fault, state, run.config.train)
    if isinstance(decision, StopRun):
        stop_run(run, decision.reason)
    if isinstance(decision, RollBack):
        roll_back(run, decision.reason)
        return None

    skipped = isinstance(decision, SkipStep)
    recent = append_recent_loss(state.recent, loss_value, run.config.train)
    run.state = state.after_step(len(ids), tokens, new_hash, skipped, recent)
    run.meter.add_tokens(tokens)
    events, run.pending_events = run.pending_events, {}
    return {
        "step": run.state.step,
        "loss": None if skipped else loss_value,
        "tokens": run.state.tokens,
        "lr": lr,
        "grad_norm": None if skipped else grad_norm,
        "skipped": run.state.skipped,
        "rollbacks": run.state.rollbacks,
        "passed": run.state.skipped_data_steps,
        "samples_hash": hash_hex(run.state.samples_hash),
        "time": time.time(),
        **({"fault": fault} if fault else {}),
        **events,
    }


def optimizer_step(run: TrainingRun, loss: float) -> tuple[float, float, str]:
    """Update the weights unless the loss is bad; return the learning rate, the gradient norm, and the fault, if any."""
    if run.writer.is_copying:
        run.meter.enter_phase("checkpoint")
        run.writer.wait_for_copy()
    run.meter.enter_phase("optimizer")
    lr = learning_rate(run.config, run.state.step)
    if fault := check_loss(loss, run.state.recent, run.config.train):
        run.model.skip_step()
        return lr, math.nan, fault
    grad_norm = run.model.step(lr)
    return lr, grad_norm, check_grad_norm(grad_norm)


def roll_back(run: TrainingRun, reason: str) -> None:
    """Restore the last good checkpoint and skip the data of the steps since then. Raises UserError if there is none."""
    run.wait_for_save()
    good = latest_valid(RunFolder(run.config.run_dir), run.group, only_good=True)
    if good is None:
        stop_run(run, f"{reason}, and there is no good checkpoint to go back to")
    restore_model(run.model, good, run.group.rank)
    if run.group.rank == 0:
        for folder in step_folders(run.writer.folder):
            if folder > good.folder:
                remove_checkpoint(folder)
    run.group.barrier()
    run.log_event("rolled_back", f"from step {run.state.step + 1} back to step {good.state.step}: {reason}")
    run.state, run.saved_step = run.state.after_rollback(good.state), good.state.step


def stop_run(run: TrainingRun, reason: str) -> NoReturn:
    """Raise UserError with the reason and what might help."""
    raise UserError(
        f"step {run.state.step + 1}: {reason}: use a lower optim.lr than {run.config.optim.lr:g}, "
        "or look at the data of these steps"
    )


def collate_rank_batches(
    run: TrainingRun, ids: np.ndarray, draws: np.ndarray
) -> tuple[list[tuple[Batch, float]], np.ndarray]:
    """Return this rank's micro-batches of a step, each with its weight (1 or 0), and their sample ids.

    Every rank takes the same number of passes, as ZeRO requires; one without samples left takes part with weight 0. Of the
    ranks that share sequences, only the first counts the ids.
    """
    micro_batch, rank, world_size = run.config.micro_batch, run.sequence.data_rank, run.sequence.data_world_size
    batches: list[tuple[Batch, float]] = []
    counted_ids = []
    for first in range(0, len(ids), micro_batch * world_size):
        indices = range(len(ids))[first + rank * micro_batch : first + (rank + 1) * micro_batch]
        rank_ids = ids[indices.start : indices.stop]
        samples = [run.samples[ids[index]] | {"draw": draws[index]} for index in indices or range(1)]
        batches.append((run.collate(samples), float(len(rank_ids) > 0)))
        counted_ids.append(rank_ids if run.sequence.rank == 0 else rank_ids[:0])
    return batches, np.concatenate(counted_ids)


@torch.no_grad()
def validate(run: TrainingRun) -> dict[str, float]:
    """Return the objective's metrics on the validation split; they do not depend on the number of ranks."""
    if run.validation is None:
        return {}
    run.heartbeat.allow_slow()  # the first validation may compile
    micro_batch, rank, world_size = run.config.micro_batch, run.sequence.data_rank, run.sequence.data_world_size
    size = len(run.validation)
    count = min(size, run.config.train.evaluate_samples or size)
    ids = np.arange(count) * size // count  # spread evenly, since adjacent samples come from the same file
    run.model.train(False)
    rank_scores = []
    for first in range(0, len(ids), micro_batch * world_size):
        run.heartbeat.beat()
        rank_ids = ids[first + rank * micro_batch : first + (rank + 1) * micro_batch]
        batch = run.collate([run.validation[i] | {"draw": i} for i in (rank_ids if len(rank_ids) else ids[:1])])
        scores = run.sequence.reduce_scores(run.objective.score(run.model, batch))  # type: ignore[arg-type]
        if len(rank_ids) and scores:
            rank_scores.append(scores)
    run.model.train()
    # A rank without any sample of its own (more ranks than samples) contributes nothing.
    gathered = run.group.all_gather_arrays(concat_scores(rank_scores) if rank_scores else {})
    return run.objective.summarize(
        run.objective.finalize_scores(concat_scores(scores for scores in gathered if scores))
    )

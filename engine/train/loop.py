"""The one step loop: pre-training, fine-tuning and a sweep's trial. No Ray and no Hydra in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.config import Config
from engine.data.order import Order, hash_hex, ids_hash
from engine.errors import UserError
from engine.objectives.contract import Batch, Objective, Samples, join_scores
from engine.train.checkpoint import CheckpointWriter
from engine.train.group import Group
from engine.train.meter import Meter
from engine.train.schedule import learning_rate
from engine.train.state import TrainState
from engine.train.zero import Sharded

Metrics = dict[str, Any]


@dataclass
class Run:
    """One rank's view of a training run."""

    config: Config
    group: Group
    objective: Objective
    model: Sharded
    samples: Samples
    validation: Samples | None  # None: the data has no validation split
    order: Order
    writer: CheckpointWriter
    about: dict[str, Any]  # what a checkpoint's manifest says of the run
    log: Callable[[Metrics], None]
    meter: Meter
    state: TrainState = field(default_factory=TrainState)
    saved_step: int = -1
    skipped_in_a_row: int = 0  # steps, up to the last one, whose gradient was not finite

    def ended(self) -> bool:
        """Whether no step is left to take."""
        train = self.config.train
        tired = train.patience is not None and self.state.stale >= train.patience
        return tired or self.state.step >= train.max_steps

    def save(self) -> None:
        """Begin to write a checkpoint of this moment, unless there is one."""
        if self.saved_step != self.state.step:
            self.writer.save(self.model.fragments(self.group.rank), self.state, self.about)
            self.saved_step = self.state.step


def fit(run: Run) -> None:
    """Train from the run's state to its last step, or until train.patience is at its end."""
    train = run.config.train
    run.model.train()
    while not run.ended():
        metrics = train_step(run)
        step = run.state.step
        if step == train.max_steps or (train.evaluate_every and step % train.evaluate_every == 0):
            run.meter.enter("evaluation")
            with run.model.averaged() if train.use_ema else nullcontext():
                found = validate(run)
            if wrong := [name for name, value in found.items() if not math.isfinite(value)]:
                raise UserError(
                    f"the validation {wrong[0]} is {found[wrong[0]]} at step {step}: use a lower optim.lr than {run.config.optim.lr:g}"
                )
            metrics |= {f"validation_{name}": value for name, value in found.items()}
            if run.objective.metric in found:
                run.state = run.state.judged(found[run.objective.metric], run.objective.mode)
        best = train.keep_best and run.state.best_step == step
        if best or run.ended() or step % train.checkpoint_every == 0:
            run.meter.enter("checkpoint")
            run.save()
        run.log(metrics | run.meter.read())
    run.writer.finish()


def train_step(run: Run) -> Metrics:
    """Take one optimizer step over the global batch and return what to log of it."""
    run.meter.enter("data")
    step = run.state.step
    run.model.loss_scale = run.state.loss_scale
    ids = run.order.samples(step)
    batches, seen = collate_share(run, ids, run.order.draws(step))
    run.meter.enter("forward")
    batches = run.objective.before_step(run.model, batches, run.group)  # type: ignore[arg-type]

    run.meter.enter("communication")
    # The loss is a sum over the global batch divided by its count, for any split among ranks and micro-batches.
    count, tokens, new_hash = run.group.sum_integers(
        sum(batch.count for batch, weight in batches if weight),
        sum(batch.tokens for batch, weight in batches if weight),
        ids_hash(seen),
    )
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.group.device)
    for batch, weight in batches:
        run.meter.enter("forward")
        loss = run.objective.loss(run.model, batch)  # type: ignore[arg-type]
        run.meter.enter("backward")
        run.model.backward(loss.sum * (weight / count))
        loss_sum += loss.sum.detach() * weight
    run.meter.enter("optimizer")
    rate = learning_rate(run.config, step)
    grad_norm = run.model.step(rate)
    run.meter.enter("communication")
    loss_value = float(run.group.sum(loss_sum)) / count

    skipped = not math.isfinite(grad_norm)
    if skipped or not math.isfinite(loss_value):
        refuse_to_go_on(run, loss_value, grad_norm)
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if skipped else 0
    run.state = run.state.after(len(ids), tokens, new_hash, skipped)
    run.meter.count(tokens)
    return {
        "step": run.state.step,
        "loss": None if skipped else loss_value,
        "tokens": run.state.tokens,
        "lr": rate,
        "grad_norm": None if skipped else grad_norm,
        "skipped": run.state.skipped,
        "samples_hash": hash_hex(run.state.samples_hash),
        "time": time.time(),
    }


def refuse_to_go_on(run: Run, loss: float, grad_norm: float) -> None:
    """Raise UserError where the loss isn't finite although the weights took the step, and after too many skipped steps."""
    allowed = run.config.train.max_skipped
    if run.state.loss_scale:
        allowed += int(math.log2(run.state.loss_scale))  # so often it can fall before that is a sign
    if math.isfinite(grad_norm) or run.skipped_in_a_row >= allowed:
        raise UserError(
            f"the loss is {loss} and the gradient norm {grad_norm} at step {run.state.step + 1}"
            + (f", after {allowed} in a row were skipped" if allowed else "")
            + f": use a lower optim.lr than {run.config.optim.lr:g}, or look at the data of these steps"
        )


def collate_share(run: Run, ids: np.ndarray, draws: np.ndarray) -> tuple[list[tuple[Batch, float]], np.ndarray]:
    """Return this rank's micro-batches of a step, each with its weight (1, or 0), and the ids in them.

    Every rank makes equally many passes, as ZeRO asks; one that is short of samples takes part with weight 0.
    """
    micro, rank, world = run.config.micro_batch, run.group.rank, run.group.world
    batches: list[tuple[Batch, float]] = []
    seen = []
    for first in range(0, len(ids), micro * world):
        places = range(len(ids))[first + rank * micro : first + (rank + 1) * micro]
        mine = ids[places.start : places.stop]
        shown = [run.samples[ids[place]] | {"draw": draws[place]} for place in places or range(1)]
        batch = run.objective.collate(shown).to(run.group.device)
        batches.append((batch, float(len(mine) > 0)))
        seen.append(mine)
    return batches, np.concatenate(seen)


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Return the objective's metrics on the validation split, the same for any number of ranks."""
    if run.validation is None:
        return {}
    micro, rank, world = run.config.micro_batch, run.group.rank, run.group.world
    size = len(run.validation)
    count = min(size, run.config.train.evaluate_samples or size)
    ids = np.arange(count) * size // count  # spread evenly: neighbours come from one file
    run.model.train(False)
    parts = []
    for first in range(0, len(ids), micro * world):
        mine = ids[first + rank * micro : first + (rank + 1) * micro]
        batch = run.objective.collate([run.validation[i] | {"draw": i} for i in (mine if len(mine) else ids[:1])])
        scores = run.objective.score(run.model, batch.to(run.group.device))  # type: ignore[arg-type]
        if len(mine):
            parts.append(scores)
    run.model.train()
    # A rank without a single sample of its own (more ranks than samples) has nothing to add.
    gathered = run.group.gather(join_scores(parts) if parts else {})
    return run.objective.summarize(run.objective.complete(join_scores(scores for scores in gathered if scores)))

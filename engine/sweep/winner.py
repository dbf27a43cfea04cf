"""The winner of a sweep, whose checkpoint becomes the bundle: the best trial, its retrained params, or a model soup."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import with_values
from engine.errors import UserError
from engine.progress import console
from engine.sweep.search_algorithm import PlaceTrial
from engine.sweep.trial import metric_values, trial_job
from engine.sweep.trial_record import Trial, TrialTask, best_first
from engine.train.checkpoint import Checkpoint, CheckpointWriter, step_folder, step_folders
from engine.train.job import TrainJob
from engine.train.launch import run_workers
from engine.train.run_folder import RunFolder, RunStatus, now
from engine.train.run_monitor import RunMonitor
from engine.train.train_state import TrainState
from engine.train.worker import export_bundle

SOUP, RETRAINED = "soup", "retrained"


@dataclass(frozen=True)
class Winner:
    """A run whose checkpoint becomes the bundle."""

    job: TrainJob
    line: dict[str, Any]  # the logged line of the checkpoint's step


def winner_of_trial(base: TrainJob, trial: Trial, place_trial: PlaceTrial) -> Winner:
    """Return a trial's run, at its best step if that checkpoint was kept, else at its last step."""
    job = named_trial_job(trial.name, trial, trial.budget, base, place_trial)
    run, step = RunFolder(job.config.run_dir), trial.steps
    if job.config.train.keep_best:
        latest = Checkpoint(step_folder(run.checkpoints, step))
        step = latest.state.best_step or step
    return Winner(job, next(line for line in run.metrics() if line["step"] == step))


def named_trial_job(name: str, trial: Trial, steps: int, base: TrainJob, place_trial: PlaceTrial) -> TrainJob:
    """Return a job with a trial's params, under this name and with this number of steps."""
    params, data = place_trial(trial.params)
    return trial_job(TrialTask(trial.index, name, params, 0, steps, str(data)), base)


def write_sweep_bundle(winner: Winner, run: RunFolder) -> None:
    """Export the winner's checkpoint as the bundle of the sweep's own run."""
    from engine.train.hardware import precision
    from engine.train.zero import DTYPES

    config = winner.job.config
    checkpoint = step_folder(RunFolder(config.run_dir).checkpoints, winner.line["step"])
    export_bundle(
        winner.job, winner.job.objective(), checkpoint, DTYPES[precision(config.train)], winner.line, run.bundle
    )


def retrain(base: TrainJob, best: Trial, place_trial: PlaceTrial, steps: int) -> Winner:
    """Train the best trial's params for `steps` steps as a separate run, resuming it if it exists."""
    job = named_trial_job(f"{_sweep_name(best)}-{RETRAINED}", best, steps, base, place_trial)
    run = RunFolder.create_or_resume(job.config)
    done = run.status()
    if not (done and done.state == "finished" and done.step >= steps):
        status = RunStatus(job.config.job, "running", max_steps=steps, pid=os.getpid(), updated=now(),
                        parent=str(job.start_bundle) if job.start_bundle else None, data=str(job.data_folder))  # fmt: skip
        run.write_status(status)
        console.print(f"retrain   {best.name}'s params for {steps:,} steps")
        untracked = with_values(job.config, {"tracking.enabled": False, "job": RETRAINED})
        with RunMonitor(run, untracked, status) as monitor:
            run_workers(job, run)
        run.write_status(replace(monitor.status, state="finished", updated=now()))
    return Winner(job, list(run.metrics())[-1])


def soup(base: TrainJob, trials: Sequence[Trial], place_trial: PlaceTrial, metric: str, mode: str) -> Winner | None:
    """Average the weights of the best trials greedily; None if no average is better on the validation split.

    Wortsman et al. 2022, recipe 1: start with the best trial, and add each other one if the average is at least as good.
    All weights are evaluated in this process. Raises UserError for models of different shapes.
    """
    with_checkpoint = [t for t in trials if step_folders(RunFolder(Path(base.config.runs_dir) / t.name).checkpoints)]
    best = best_first(with_checkpoint, mode)[: base.config.sweep.soup]
    if len(best) < 2:
        return None
    winners = [winner_of_trial(base, trial, place_trial) for trial in best]
    evaluator = SoupEvaluator(winners[0])
    candidates = [evaluator.load_weights(winner) for winner in winners]
    average, count, value = candidates[0], 1, evaluator.evaluate(candidates[0])[metric]
    value_alone, ingredients, soup_metrics = value, [best[0].name], {}
    for trial, weights in zip(best[1:], candidates[1:], strict=True):
        mixed = {name: (average[name] * count + weights[name]) / (count + 1) for name in average}
        metrics = evaluator.evaluate(mixed)
        if metrics[metric] >= value if mode == "max" else metrics[metric] <= value:
            average, count, value, soup_metrics = mixed, count + 1, metrics[metric], metrics
            ingredients.append(trial.name)
    is_better = value > value_alone if mode == "max" else value < value_alone
    console.print(
        f"soup      {metric} {value:.4f} of {' + '.join(ingredients)}, {value_alone:.4f} of {best[0].name} alone: "
        f"{'the soup is kept' if is_better else 'the best trial is kept'}"
    )
    if not is_better:
        return None
    job = without_lora(named_trial_job(f"{_sweep_name(best[0])}-{SOUP}", best[0], best[0].budget, base, place_trial))
    line = winners[0].line | {f"validation_{name}": v for name, v in soup_metrics.items()} | {"soup": ingredients}
    lines = [past for past in RunFolder(winners[0].job.config.run_dir).metrics() if past["step"] < line["step"]]
    write_soup_run(job, average, [*lines, line])
    return Winner(job, line)


class SoupEvaluator:
    """Loads and evaluates the weights of winners on the validation split, in fp32."""

    def __init__(self, winner: Winner) -> None:
        """Use the model and the data of this winner."""
        from engine.data.shards import Split
        from engine.train.init_model import make_model
        from engine.train.zero import EMA

        job = without_lora(winner.job)
        self._config, self._objective = job.config, job.objective()
        self._model = make_model(job, self._objective)
        self._objective.bind_model(self._model.config)
        self._samples = self._objective.samples(Split.open(job.data_folder, "validation"))
        self._kind = EMA if job.config.train.use_ema else "weight"

    def load_weights(self, winner: Winner) -> dict[str, Any]:
        """Return the fp32 weights of a winner's bundle; LoRA matrices are merged, so their rank may differ between winners."""
        from engine.models.lora import merge_lora
        from engine.train.init_model import load_weights, make_model

        checkpoint = Checkpoint(step_folder(RunFolder(winner.job.config.run_dir).checkpoints, winner.line["step"]))
        if winner.job.config.objective.lora.rank:
            model = make_model(winner.job, self._objective)
            load_weights(model, checkpoint, self._kind)
            merge_lora(model)
            weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        else:
            weights = checkpoint.weights(self._kind)
        differing = [n for n, p in self._model.named_parameters() if n not in weights or weights[n].shape != p.shape]
        if differing:
            raise UserError(
                f"sweep.soup averages weights, and {winner.job.config.name} has a model of another shape ({differing[0]}): leave it out"
            )
        return weights

    def evaluate(self, weights: dict[str, Any]) -> dict[str, float]:
        """Return the objective's metrics of these weights, on as many samples as a trial's validation uses."""
        import torch

        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])
        size, micro_batch = len(self._samples), self._config.micro_batch
        count = min(size, self._config.train.evaluate_samples or size)
        indices = [i * size // count for i in range(count)]
        batches = (
            self._objective.collate([self._samples[i] | {"draw": i} for i in indices[first : first + micro_batch]])
            for first in range(0, count, micro_batch)
        )
        return self._objective.metrics(self._model.eval(), batches)


def without_lora(job: TrainJob) -> TrainJob:
    """Return the job with LoRA turned off."""
    return replace(job, config=with_values(job.config, {"objective.lora.rank": 0}))


def write_soup_run(job: TrainJob, weights: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Write averaged weights as a separate run: a checkpoint, and the logged lines."""
    from engine.train.zero import EMA, Fragment

    run = RunFolder(job.config.run_dir)
    shutil.rmtree(run.path, ignore_errors=True)
    run.path.mkdir(parents=True)
    kinds = {"weight", EMA} if job.config.train.use_ema else {"weight"}
    fragments = [
        Fragment(name, tuple(tensor.shape), 0, {kind: tensor.reshape(-1).clone() for kind in kinds})
        for name, tensor in weights.items()
    ]
    writer = CheckpointWriter(run.checkpoints, 0, 1, keep=1)
    writer.save(fragments, TrainState(step=lines[-1]["step"]), {"soup": lines[-1]["soup"]})
    writer.wait()
    if writer.has_failed:
        raise UserError(f"the averaged weights could not be written to {run.checkpoints}: free some disk space")
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def winner_value(winner: Winner, metric: str) -> float:
    """Return a winner's value of the metric."""
    return metric_values(winner.line, [metric])[metric]


def delete_trial_checkpoints(run: RunFolder, best: str) -> None:
    """Delete the checkpoints of all trials but the best, which a larger sweep may still need."""
    for folder in (run.path / "trials").iterdir():
        if folder.name != best:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(run.path / "tune", ignore_errors=True)


def _sweep_name(trial: Trial) -> str:
    return trial.name.rsplit("-", 1)[0]

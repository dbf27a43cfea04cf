"""From the trials' last checkpoints to one bundle: the best trial's, trained again at full length, or averaged over the best."""

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
from engine.sweep.trial_record import Trial, best_first
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
    line: dict[str, Any]  # what was logged of the checkpoint's step


def winner_of_trial(base: TrainJob, trial: Trial, place: PlaceTrial) -> Winner:
    """Return a trial's run, at its best step if the checkpoint of that was kept, else at its last."""
    job = named_trial_job(trial.name, trial, trial.budget, base, place)
    run, step = RunFolder(job.config.run_dir), trial.steps
    if job.config.train.keep_best:
        newest = Checkpoint(step_folder(run.checkpoints, step))
        step = newest.state.best_step or step
    return Winner(job, next(line for line in run.metrics() if line["step"] == step))


def named_trial_job(name: str, trial: Trial, steps: int, base: TrainJob, place: PlaceTrial) -> TrainJob:
    """Return the job of a trial's values under another name, for so many steps."""
    params, data = place(trial.params)
    return trial_job({"name": name, "params": params, "until": steps, "data": data}, base)


def write_sweep_bundle(winner: Winner, run: RunFolder) -> None:
    """Make the winner's bundle that of the sweep's own run."""
    from engine.train.hardware import precision
    from engine.train.zero import DTYPES

    config = winner.job.config
    checkpoint = step_folder(RunFolder(config.run_dir).checkpoints, winner.line["step"])
    export_bundle(
        winner.job, winner.job.objective(), checkpoint, DTYPES[precision(config.train)], winner.line, run.bundle
    )


def retrain(base: TrainJob, best: Trial, place: PlaceTrial, steps: int) -> Winner:
    """Train the best trial's values for so many steps, as a run of its own, or go on with it."""
    job = named_trial_job(f"{_sweep_of(best)}-{RETRAINED}", best, steps, base, place)
    run = RunFolder.create_or_resume(job.config)
    done = run.status()
    if not (done and done.state == "finished" and done.step >= steps):
        status = RunStatus(job.config.job, "running", max_steps=steps, pid=os.getpid(), updated=now(),
                        parent=str(job.start_bundle) if job.start_bundle else None, data=str(job.data_folder))  # fmt: skip
        run.write_status(status)
        console.print(f"retrain   {best.name}'s values for {steps:,} steps")
        untracked = with_values(job.config, {"tracking.enabled": False, "job": RETRAINED})
        with RunMonitor(run, untracked, status) as watch:
            run_workers(job, run)
        run.write_status(replace(watch.status, state="finished", updated=now()))
    return Winner(job, list(run.metrics())[-1])


def soup(base: TrainJob, trials: Sequence[Trial], place: PlaceTrial, metric: str, mode: str) -> Winner | None:
    """Average the weights of the best trials greedily; None where no average is better on the validation split.

    Wortsman et al. 2022, recipe 1: the best goes in first, each of the others if the average with it is at least as good.
    All are measured alike, in this process. Raises UserError for models of different shapes.
    """
    kept = [t for t in trials if step_folders(RunFolder(Path(base.config.runs_dir) / t.name).checkpoints)]
    best = best_first(kept, mode)[: base.config.sweep.soup]
    if len(best) < 2:
        return None
    winners = [winner_of_trial(base, trial, place) for trial in best]
    kitchen = ModelSoup(winners[0])
    parts = [kitchen.weights(winner) for winner in winners]
    chosen, taken, value = parts[0], 1, kitchen.measure(parts[0])[metric]
    alone, inside, found = value, [best[0].name], {}
    for trial, part in zip(best[1:], parts[1:], strict=True):
        mixed = {name: (chosen[name] * taken + part[name]) / (taken + 1) for name in chosen}
        measured = kitchen.measure(mixed)
        if measured[metric] >= value if mode == "max" else measured[metric] <= value:
            chosen, taken, value, found = mixed, taken + 1, measured[metric], measured
            inside.append(trial.name)
    better = value > alone if mode == "max" else value < alone
    console.print(
        f"soup      {metric} {value:.4f} of {' + '.join(inside)}, {alone:.4f} of {best[0].name} alone: "
        f"{'the soup is kept' if better else 'the best trial is kept'}"
    )
    if not better:
        return None
    job = without_lora(named_trial_job(f"{_sweep_of(best[0])}-{SOUP}", best[0], best[0].budget, base, place))
    line = winners[0].line | {f"validation_{name}": v for name, v in found.items()} | {"soup": inside}
    write_soup_run(
        job,
        chosen,
        [*(one for one in RunFolder(winners[0].job.config.run_dir).metrics() if one["step"] < line["step"]), line],
    )
    return Winner(job, line)


class ModelSoup:
    """Measures weights on the validation split, in fp32, outside of any training."""

    def __init__(self, winner: Winner) -> None:
        """Take the model and the data of this winner."""
        from engine.data.shards import Split
        from engine.train.init_model import make_model
        from engine.train.zero import EMA

        job = without_lora(winner.job)
        self._config, self._objective = job.config, job.objective()
        self._model = make_model(job, self._objective)
        self._objective.bind_model(self._model.config)
        self._samples = self._objective.samples(Split.open(job.data_folder, "validation"))
        self._kind = EMA if job.config.train.use_ema else "weight"

    def weights(self, winner: Winner) -> dict[str, Any]:
        """Return the weights that a winner's bundle would have, fp32; what LoRA trained is merged, so its rank doesn't matter."""
        from engine.models.lora import merge_lora
        from engine.train.init_model import load_weights, make_model

        checkpoint = Checkpoint(step_folder(RunFolder(winner.job.config.run_dir).checkpoints, winner.line["step"]))
        if winner.job.config.objective.lora.rank:
            model = make_model(winner.job, self._objective)
            load_weights(model, checkpoint, self._kind)
            merge_lora(model)
            found = {name: parameter.detach() for name, parameter in model.named_parameters()}
        else:
            found = checkpoint.weights(self._kind)
        wrong = [n for n, p in self._model.named_parameters() if n not in found or found[n].shape != p.shape]
        if wrong:
            raise UserError(
                f"sweep.soup averages weights, and {winner.job.config.name} has a model of another shape ({wrong[0]}): leave it out"
            )
        return found

    def measure(self, weights: dict[str, Any]) -> dict[str, float]:
        """Return the objective's metrics of these weights, on as many samples as a trial's validation has."""
        import torch

        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])
        size, micro = len(self._samples), self._config.micro_batch
        count = min(size, self._config.train.evaluate_samples or size)
        places = [i * size // count for i in range(count)]
        batches = (
            self._objective.collate([self._samples[i] | {"draw": i} for i in places[first : first + micro]])
            for first in range(0, count, micro)
        )
        return self._objective.metrics(self._model.eval(), batches)


def without_lora(job: TrainJob) -> TrainJob:
    """Return the job whose model has no matrices of LoRA's beside its weights."""
    return replace(job, config=with_values(job.config, {"objective.lora.rank": 0}))


def write_soup_run(job: TrainJob, weights: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Write averaged weights as a run of its own: a checkpoint, and the lines of the best trial but for the last one's figures."""
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
        raise UserError(f"the averaged weights could not be written to {run.checkpoints}: free some room")
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def winner_value(winner: Winner, metric: str) -> float:
    """Return what was measured of a winner."""
    return metric_values(winner.line, [metric])[metric]


def delete_trial_checkpoints(run: RunFolder, best: str) -> None:
    """Keep metrics, logs and records of the trials, and the checkpoint of the best, which more trials may be measured by."""
    for folder in (run.path / "trials").iterdir():
        if folder.name != best:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(run.path / "tune", ignore_errors=True)


def _sweep_of(trial: Trial) -> str:
    return trial.name.rsplit("-", 1)[0]

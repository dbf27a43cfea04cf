"""A sweep of 16 trials on one small task: its wall time, the steps that ASHA spends, and what each trial costs beside its steps.

The task: a pre-trained llama_tiny learns to name the package of a function (standard library, 64 tokens), two trials at a
time on two cores, in fp32. The plain pattern is the one of Ray's manual: a Tune driver for each trial that fits a
TorchTrainer, whose worker imports, joins a process group, loads the base weights and trains with the same loop, so that the
results are equal (the losses are compared). Each is a command in a process of its own, with its own Ray.

Predicted: 6 times the plain pattern at 32 steps a trial, since there each trial starts a controller and a worker (15 s of
processor time) for 3 s of steps; 0.16 of the steps at 96 a trial with one in four going on after 6 and 24 steps;
1.0 s a trial, most of it DeepSpeed's `initialize`, the first validation and the last checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.interleaved import record

ROOT = Path(__file__).parents[2]
TRIALS, SHORT, LONG = 16, 32, 96
TASK = [
    "model=llama_tiny", "data.max_documents=2000", "data.sequence_length=64", "train.precision=fp32", "train.micro_batch=16",
    "train.global_batch=16", "train.evaluate_samples=256", "tracking.enabled=false", "cluster.cpus=2", f"sweep.trials={TRIALS}",
    "sweep.space={optim.lr:{loguniform:[3e-5,3e-2]},optim.weight_decay:{choice:[0.0,0.1]},optim.beta2:{uniform:[0.9,0.999]}}",
]  # fmt: skip


def command(job: str, folder: Path, *words: str) -> float:
    """Run a job of ours; return its seconds."""
    began = time.perf_counter()
    line = [sys.executable, "-m", f"jobs.{job}", f"runs_dir={folder}", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - began


def swept(folder: Path, name: str) -> dict[str, Any]:
    """Read what a sweep has found."""
    found: dict[str, Any] = json.loads((folder / name / "sweep.json").read_text())
    return found


def plain(folder: Path, words: Sequence[str]) -> None:
    """Be the plain pattern: the same 16 draws, each a Tune driver with a TorchTrainer; print the last losses."""
    from cluster.environment import set_default_environment

    set_default_environment()
    import ray
    from ray import train, tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from engine.config import with_values
    from engine.sweep.search_space import check_space, samples
    from engine.train.job import Job
    from engine.train.launch import make_job
    from jobs.entry import compose

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = compose("sweep", [f"runs_dir={folder}", *words])
    job = make_job(config)

    def worker(spec: dict[str, Any]) -> None:
        import torch

        from engine.train.process_group import Group
        from engine.train.worker import work

        last = work(Job.from_dict(spec), Group(0, 1, torch.device("cpu")))
        train.report({"loss": last["validation_loss"]})

    def driver(values: dict[str, Any]) -> None:
        index = values["index"]
        name = f"plain-{index:03d}"
        own = with_values(
            job.config, {**drawn[index], "name": name, "train.evaluate_every": config.train.evaluate_every}
        )
        (folder / name / "logs").mkdir(parents=True)
        TorchTrainer(
            worker,
            train_loop_config=Job(own, job.data, job.start).to_dict(),
            scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.9}),
            run_config=train.RunConfig(
                name=name, storage_path=str(folder / "plain-train"), callbacks=[TuneReportCallback()]
            ),
        ).fit()

    drawn = samples(check_space(config), config, config.seed)
    results = tune.Tuner(
        tune.with_resources(driver, {"CPU": 0.1}),
        param_space={"index": tune.grid_search(list(range(TRIALS)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=2),
        run_config=tune.RunConfig(name="plain", storage_path=str(folder), verbose=0),
    ).fit()
    print(json.dumps({result.config["index"]: result.metrics["loss"] for result in results}))
    ray.shutdown()


def overhead(folder: Path, name: str) -> float:
    """Return the seconds a trial beside its steps and validations, over all but the first, of a sweep with one at a time."""
    files = sorted((folder / name / "trials").glob("*/trial.json"), key=lambda file: file.stat().st_mtime)
    lines = [
        json.loads(line) for file in files[1:] for line in (file.parent / "metrics.jsonl").read_text().splitlines()
    ]
    training = sum(line["seconds"] + line["evaluation_s"] for line in lines)
    return (files[-1].stat().st_mtime - files[0].stat().st_mtime - training) / (len(files) - 1)


def main() -> None:
    """Print the three figures."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command("pretrain", folder, "model=llama_tiny", "name=base", "data.sequence_length=64", "train.max_steps=60",
                "data.max_documents=400", "tracking.enabled=false", "optim.lr=2e-3")  # fmt: skip
        words = [*TASK, f"bundle={folder}/base/bundle", f"train.max_steps={SHORT}", f"train.evaluate_every={SHORT}"]
        command("sweep", folder, *words, "name=first", "sweep.trials=1", "train.max_steps=1")  # prepares the data

        line = [sys.executable, "-m", "tests.bench.sweep", str(folder), *words]
        began = time.perf_counter()
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        theirs = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        losses = {int(index): loss for index, loss in json.loads(done.stdout.strip().splitlines()[-1]).items()}
        ours = command(
            "sweep", folder, *words, "name=ours", "sweep.scheduler=none", "sweep.metric=loss", "sweep.mode=min"
        )
        apart = max(abs(trial["value"] - losses[trial["index"]]) for trial in swept(folder, "ours")["trials"])
        print(
            f"16 trials of {SHORT} steps: ours {ours:.0f} s, plain {theirs:.0f} s; losses differ by {apart:.1e} at most"
        )
        print(f"plain / ours: {theirs / ours:.2f}, target 2.5")
        record(setting="wall time", ours="ours", against="plain", unit="s", ratio=theirs / ours, target=2.5, repeats=1,
               values={"ours": [ours], "plain": [theirs]}, apart=apart)  # fmt: skip

        command("sweep", folder, *words, "name=alone", "sweep.scheduler=none", "sweep.concurrent=1", "sweep.trials=8")
        spent = overhead(folder, "alone")
        print(f"beside its steps, a trial after the first: {spent:.2f} s, target 2")
        record(setting="overhead", ours="ours", unit="s", ratio=spent, target=2.0, repeats=7)

        # By the loss: of 256 samples as many are named right by several trials, and ties go on.
        long = [*words[:-2], f"train.max_steps={LONG}", "train.evaluate_every=6", "sweep.metric=loss", "sweep.mode=min"]
        stopping = ["sweep.scheduler=asha", "sweep.reduction=4", "sweep.grace_steps=6"]
        command("sweep", folder, *long, "name=full", "sweep.scheduler=none")
        command("sweep", folder, *long, "name=asha", *stopping)
        full, asha = swept(folder, "full"), swept(folder, "asha")
        steps = sum(trial["steps"] for trial in asha["trials"]) / (TRIALS * LONG)
        regret = asha["best"]["value"] / full["best"]["value"] - 1
        print(f"ASHA: {steps:.3f} of the steps, target 0.2; loss {asha['best']['value']:.4f}, of the full search "
              f"{full['best']['value']:.4f}: regret {regret:.2%}, target 1 % or less")  # fmt: skip
        record(setting="ASHA's steps", ours="asha", against="full random search", unit="steps", ratio=steps, target=0.2,
               repeats=1, regret=regret)  # fmt: skip


if __name__ == "__main__":
    plain(Path(sys.argv[1]), sys.argv[2:]) if len(sys.argv) > 1 else main()

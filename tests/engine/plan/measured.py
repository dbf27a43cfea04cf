"""Measures what the plan predicts: the resident memory of a rank of a real run, over what it was after the imports."""

from __future__ import annotations

import json
import os
from pathlib import Path

from engine.config import Config
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.train.job import Job
from tests.engine.train.ranks import on_ranks

WARM = 2  # steps before the first that counts: moments, gradients and buffers are made in them
LAST = 4


def measured_peak(config: Config) -> float:
    """Train for a few steps on config.train.workers ranks; return rank 0's highest resident bytes in steps 3 and 4, over those after the imports."""
    config.run_dir.joinpath("logs").mkdir(parents=True)
    on_ranks(_rank, config.train.workers, json.dumps(Job(config, prepare(config)).to_dict()), fresh=True)
    return float((config.run_dir / "peak").read_text())


def _rank(_rank: int, world: int, spec: str) -> None:
    import torch

    from engine.train import loop
    from engine.train.process_group import Group
    from engine.train.init_model import make_model
    from engine.train.worker import work
    from engine.train.zero import import_deepspeed

    job = Job.from_dict(json.loads(spec))
    import_deepspeed()
    with torch.device("meta"):
        make_model(job, job.objective())  # imports the model's class
    job.objective().samples(Split.open(job.data, "train"))[0]  # imports what reads the shards
    before = resident("VmRSS")
    sound = loop.train_step

    def train_step(run: loop.Run) -> loop.Metrics:
        if run.state.step == WARM:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        if run.state.step == LAST:
            if run.group.rank == 0:
                (job.config.run_dir / "peak").write_text(str(resident("VmHWM") - before))
            run.group.barrier()
            os._exit(0)
        return sound(run)

    loop.train_step = train_step
    work(job, Group(_rank, world, torch.device("cpu")))


def resident(kind: str) -> int:
    """Return VmRSS (now) or VmHWM (highest) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

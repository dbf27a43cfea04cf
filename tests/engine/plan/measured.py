"""Measures the memory that the plan predicts: the resident memory of a rank of a real run, minus that after the imports."""

from __future__ import annotations

import json
import os
from pathlib import Path

from engine.config import Config
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.train.job import TrainJob
from tests.engine.train.ranks import on_ranks

WARMUP_STEPS = 2  # warm-up steps, which allocate moments, gradients and buffers
LAST_STEP = 4


def measured_peak(config: Config) -> float:
    """Train for a few steps on config.train.workers ranks; return rank 0's peak resident bytes in steps 3 and 4, minus those after the imports."""
    config.run_dir.joinpath("logs").mkdir(parents=True)
    on_ranks(_rank, config.train.workers, json.dumps(TrainJob(config, prepare(config)).to_dict()), fresh=True)
    return float((config.run_dir / "peak").read_text())


def _rank(_rank: int, world: int, spec: str) -> None:
    import torch

    from engine.train import loop
    from engine.train.init_model import make_model
    from engine.train.process_group import ProcessGroup
    from engine.train.worker import train_worker
    from engine.train.zero import import_deepspeed

    job = TrainJob.from_dict(json.loads(spec))
    import_deepspeed()
    with torch.device("meta"):
        make_model(job, job.objective())  # imports the model's class
    job.objective().samples(Split.open(job.data_folder, "train"))[0]  # imports what reads the shards
    before = resident_bytes("VmRSS")
    original_train_step = loop.train_step

    def train_step(run: loop.TrainingRun) -> loop.Metrics:
        if run.state.step == WARMUP_STEPS:
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the memory that is resident now
        if run.state.step == LAST_STEP:
            if run.group.rank == 0:
                (job.config.run_dir / "peak").write_text(str(resident_bytes("VmHWM") - before))
            run.group.barrier()
            os._exit(0)
        return original_train_step(run)

    loop.train_step = train_step
    train_worker(job, ProcessGroup(_rank, world, torch.device("cpu")))


def resident_bytes(kind: str) -> int:
    """Return VmRSS (current) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))

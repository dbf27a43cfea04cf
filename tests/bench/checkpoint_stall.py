"""Milliseconds that a checkpoint stalls training, against DeepSpeed's `engine.save_checkpoint`, in one process.

Both save the same engine (llama_5m, ZeRO 1, bf16 if the CPU has it) to the same disk, in turn. Ours copies to a reused buffer
during the next forward and backward pass, and writes asynchronously: its stall is the time of `save` plus the time that the next
update waits for the copy (60 MB, some 10 ms, and the passes take 250): under a millisecond. The peer serializes and writes, 30
to 150 ms. Predicted: 0.03. The time that the writer thread takes from concurrent steps is printed too: on two cores it can be as
long as the write.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from cluster.environment import set_default_environment
from engine.config import with_values
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.train import hardware
from engine.train.checkpoint import CheckpointWriter
from engine.train.init_model import make_model
from engine.train.job import TrainJob
from engine.train.loop import TrainingRun, train_step
from engine.train.meter import StepMeter
from engine.train.sequence_parallel import SequenceParallel
from engine.train.worker import single_process_group
from engine.train.zero import ZeroModel
from jobs.entry import compose
from tests.bench.interleaved import interleave, show

STEPS = 8  # during which a save ends


def make_run(folder: Path) -> TrainingRun:
    """Return a run of llama_5m before its first step."""
    values = {"runs_dir": str(folder), "train.global_batch": 8, "train.micro_batch": 8, "zero.stage": 1}
    config = with_values(compose("pretrain", []), values)
    job, group = TrainJob(config, prepare(config)), single_process_group()
    objective = job.objective()
    model = make_model(job, objective)
    samples = objective.samples(Split.open(job.data_folder, "train"))
    from engine.data.order import DataOrder

    sharded = ZeroModel(model, config, 1, hardware.precision(config.train))
    sharded.init_optimizer_state(0)
    sharded.train()
    return TrainingRun(
        config=config, group=group, objective=objective, model=sharded, samples=samples, validation=None, sequence=SequenceParallel(group),
        order=DataOrder(len(samples), config.global_batch, 0), writer=CheckpointWriter(folder / "ours", 0, 1, 1), checkpoint_info={},
        log=print, meter=StepMeter(group.device, 1.0, 1.0),
    )  # fmt: skip


def main() -> None:
    """Print the ratio of the stalls, and how much a save slows down concurrent steps."""
    set_default_environment()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder)

        def steps_ms() -> float:
            began = time.perf_counter()
            for _ in range(STEPS):
                train_step(run)
            return 1000 * (time.perf_counter() - began)

        def ours() -> float:
            train_step(run)
            run.writer.wait()
            began = time.perf_counter()
            run.save()
            saved = time.perf_counter() - began
            return 1000 * (saved + wait_for_copy())

        def wait_for_copy() -> float:
            """Run a step and return how many seconds its update waited for the copy."""
            waits = []

            def wait_for_copy() -> None:
                began = time.perf_counter()
                CheckpointWriter.wait_for_copy(run.writer)
                waits.append(time.perf_counter() - began)

            with mock.patch.object(run.writer, "wait_for_copy", wait_for_copy):
                train_step(run)
            return sum(waits)

        def theirs() -> float:
            train_step(run)
            run.writer.wait()
            began = time.perf_counter()
            run.model.engine.save_checkpoint(str(folder / "theirs"), tag="step")
            stall = 1000 * (time.perf_counter() - began)
            shutil.rmtree(folder / "theirs")
            return stall

        stalls = interleave({"ours": ours, "engine.save_checkpoint": theirs}, repeats=9)
        show(stalls, "ms", "ours", {"engine.save_checkpoint": 0.1})
        with_save, without = [], []
        for _ in range(5):
            run.writer.wait()
            without.append(steps_ms())
            run.save()
            with_save.append(steps_ms())
        extra = statistics.median(a - b for a, b in zip(with_save, without, strict=True))
        print(
            f"{STEPS} steps concurrent with a save take {extra:.0f} ms longer than {statistics.median(without):.0f} ms"
        )


if __name__ == "__main__":
    main()

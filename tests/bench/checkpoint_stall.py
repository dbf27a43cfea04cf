"""How long training stands still for a checkpoint, against DeepSpeed's `engine.save_checkpoint`, in one process.

Both save the very same engine (llama_5m, ZeRO 1, bf16 where the processor has it) to the same disk, in turn. Ours copies
to memory that it keeps, beside the next forward and backward pass, and writes behind the loop's back: its stall is what
`save` takes and what the next update waits for the copy (60 MB, some 10 ms, and the passes take 250): under a millisecond.
The peer serializes and writes, 30 to 150 ms. Predicted: 0.03. What the writing thread takes from the steps that run
meanwhile is printed too: on two cores it can be as long as the write.
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

from cluster.environment import quiet_environment
from engine.config import with_values
from engine.data.prepare import prepare
from engine.data.shards import Split
from engine.train import hardware
from engine.train.checkpoint import CheckpointWriter
from engine.train.init_model import make_model
from engine.train.job import Job
from engine.train.loop import Run, train_step
from engine.train.meter import Meter
from engine.train.sequence_parallel import SequenceParallel
from engine.train.worker import local_group
from engine.train.zero import ZeroModel
from jobs.entry import compose
from tests.bench.interleaved import interleave, show

STEPS = 8  # in which a save has time to end


def make_run(folder: Path) -> Run:
    """Return a run of llama_5m that is ready for its first step."""
    values = {"runs_dir": str(folder), "train.global_batch": 8, "train.micro_batch": 8, "zero.stage": 1}
    config = with_values(compose("pretrain", []), values)
    job, group = Job(config, prepare(config)), local_group()
    objective = job.objective()
    model = make_model(job, objective)
    samples = objective.samples(Split.open(job.data, "train"))
    from engine.data.order import Order

    sharded = ZeroModel(model, config, 1, hardware.precision(config.train))
    sharded.ensure_moments(0)
    sharded.train()
    return Run(
        config=config, group=group, objective=objective, model=sharded, samples=samples, validation=None, sequence=SequenceParallel(group),
        order=Order(len(samples), config.global_batch, 0), writer=CheckpointWriter(folder / "ours", 0, 1, 1), about={},
        log=print, meter=Meter(group.device, 1.0, 1.0),
    )  # fmt: skip


def main() -> None:
    """Print the ratio of the stalls, and what a save costs the steps beside it."""
    quiet_environment()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder)

        def steps() -> float:
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
            return 1000 * (saved + held())

        def held() -> float:
            """Take a step and return how long its update waited for the copy, in seconds."""
            waits = []

            def hold() -> None:
                began = time.perf_counter()
                CheckpointWriter.hold(run.writer)
                waits.append(time.perf_counter() - began)

            with mock.patch.object(run.writer, "hold", hold):
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

        found = interleave({"ours": ours, "engine.save_checkpoint": theirs}, repeats=9)
        show(found, "ms", "ours", {"engine.save_checkpoint": 0.1})
        with_save, without = [], []
        for _ in range(5):
            run.writer.wait()
            without.append(steps())
            run.save()
            with_save.append(steps())
        extra = statistics.median(a - b for a, b in zip(with_save, without, strict=True))
        print(f"{STEPS} steps beside a save take {extra:.0f} ms longer than {statistics.median(without):.0f} ms")


if __name__ == "__main__":
    main()

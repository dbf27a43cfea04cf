"""Seconds from the SIGKILL of a worker to the next step, against torchrun's restart of a plain DeepSpeed loop.

Two workers, llama_5m, the same batch, ZeRO 1, a checkpoint every ten steps. Ours runs through Ray Train as `manta
pretrain` does, and is killed once its spare processes are ready (see engine/train/trainer.py). torchrun starts new
processes, which import torch, transformers and DeepSpeed, some five seconds each; ours has them at hand, and Ray Train
forms a group anew in one to two. Predicted: 0.5 to 0.8.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from engine.train.preload import RANK
from tests.bench.interleaved import interleave, show

ROOT = Path(__file__).parents[2]
WORKERS = 2
AT = 25  # the step at which a worker is killed; the checkpoint before it is of step 20
HUNG_S = 60.0  # after which a restart counts as failed
# Or torchrun's new ranks find the addresses of those that ended, and most of its restarts hang.
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
PEER = """
import json, os, sys, time
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch, deepspeed
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[2]))
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
engine, *_ = deepspeed.initialize(
    model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": True}, "steps_per_print": 2**31})
step = 0
if (folder / "saved" / "latest").exists():
    _, client = engine.load_checkpoint(str(folder / "saved"))
    step = client["step"]
generator = torch.Generator().manual_seed(rank)
while step < 100_000:
    tokens = torch.randint(0, 4096, (1, 257), generator=generator)
    logits = engine(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    step += 1
    if step % 10 == 0:
        engine.save_checkpoint(str(folder / "saved"), client_state={"step": step})
    if rank == 0:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "pid": os.getpid(), "time": time.time()}) + "\\n")
"""


def lines(file: Path) -> list[dict[str, float]]:
    """Return the whole lines of a log."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait(what: Callable[[], object], process: subprocess.Popen[bytes], at_most_s: float = 180.0) -> None:
    """Wait until `what` holds. Raises RuntimeError where the process ends before, TimeoutError where it takes too long."""
    limit = time.monotonic() + at_most_s
    while not what():
        if process.poll() is not None:
            raise RuntimeError(f"a contestant ended: see {process.args}")
        if time.monotonic() > limit:
            raise TimeoutError
        time.sleep(0.01)


def ranks(process: subprocess.Popen[bytes], word: str) -> Iterator[psutil.Process]:
    """Yield the contestant's processes with a word in their command line."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                yield child
        except psutil.Error:
            continue


def spares(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes that wait to be ranks and have done their imports: they use no processor time."""
    idle = [child for child in ranks(process, "ray::IDLE") if child.environ().get(RANK)]
    return [child for child in idle if child.cpu_percent(0.5) < 5 and child.memory_info().rss > 250e6]


def seconds(command: list[str], log: Path, word: str, ready: Callable[[subprocess.Popen[bytes]], bool]) -> float:
    """Start a contestant, kill one of its ranks and return the seconds to the next step."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | NEW_STORE
    with (
        open(os.devnull, "wb") as nowhere,
        subprocess.Popen(command, stdout=nowhere, stderr=nowhere, cwd=ROOT, env=environment) as process,
    ):
        try:
            wait(lambda: len(lines(log)) >= AT and ready(process), process)
            victim = list(ranks(process, word))[-1]
            killed = time.time()
            victim.kill()
            time.sleep(0.3)  # a step that was under way may still be told
            wait(lambda: lines(log)[-1]["time"] > killed + 0.3, process, HUNG_S)
            return next(line["time"] for line in lines(log) if line["time"] > killed + 0.3) - killed
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGINT)
                for child in psutil.wait_procs(children, timeout=30)[1]:
                    child.kill()


def main() -> None:
    """Print the ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder, turn = Path(name), iter(range(1000))
        peer = folder / "peer.py"
        peer.write_text(PEER)
        prepared = [
            sys.executable, "-m", "jobs.manta", "pretrain", f"runs_dir={folder}", "train.global_batch=2", "zero.stage=1",
            "tracking.enabled=false", "train.evaluate_samples=1",
        ]  # fmt: skip
        subprocess.run([*prepared, "name=first", "train.max_steps=1"], check=True, capture_output=True, cwd=ROOT)

        def ours() -> float:
            run = f"ours{next(turn)}"
            command = [
                *prepared, f"name={run}", f"train.workers={WORKERS}", "train.max_steps=100000", "train.checkpoint_every=10",
            ]  # fmt: skip
            enough = lambda process: len(spares(process)) >= WORKERS  # noqa: E731
            return seconds(command, folder / run / "metrics.jsonl", "RayTrainWorker", enough)

        def torchrun() -> float:
            place = folder / f"peer{next(turn)}"
            place.mkdir()
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}",
                "--max-restarts=3", str(peer), str(place), str(folder / "first" / "bundle"),
            ]  # fmt: skip
            return seconds(command, place / "metrics.jsonl", str(peer), lambda process: True)

        show(interleave({"ours": ours, "torchrun": torchrun}, repeats=3), "s", "ours", {"torchrun": 1.0})


if __name__ == "__main__":
    main()

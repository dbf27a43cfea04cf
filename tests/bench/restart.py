"""Seconds from the SIGKILL of a worker to the next step, against torchrun's restart of a plain DeepSpeed loop.

Two workers, llama_5m, the same batch, ZeRO 1, a checkpoint every ten steps. Ours runs through Ray Train as `manta
pretrain` does, and is killed once its standby processes are ready (see engine/train/trainer.py). torchrun starts new
processes, which import torch, transformers and DeepSpeed, some five seconds each; ours has preloaded them, and Ray Train
forms a new process group in one to two. Predicted: 0.5 to 0.8.
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

from engine.train.preload import RANK_VARIABLE
from tests.bench.interleaved import interleave, show

ROOT = Path(__file__).parents[2]
WORKERS = 2
KILL_STEP = 25  # a worker is killed at this step; the last checkpoint is of step 20
RESTART_TIMEOUT_S = 60.0
# Without it torchrun's new ranks read the addresses of the ended ones, and most of its restarts hang.
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


def read_log(file: Path) -> list[dict[str, float]]:
    """Return the complete lines of a log."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait(condition: Callable[[], object], process: subprocess.Popen[bytes], timeout_s: float = 180.0) -> None:
    """Wait until `condition` holds. Raises RuntimeError if the process ends before, TimeoutError after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"a contestant ended: see {process.args}")
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def processes_matching(process: subprocess.Popen[bytes], word: str) -> Iterator[psutil.Process]:
    """Yield the contestant's processes with a word in their command line."""
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                yield child
        except psutil.Error:
            continue


def standby_processes(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the standby workers that have finished their imports: they use no CPU time."""
    idle = [child for child in processes_matching(process, "ray::IDLE") if child.environ().get(RANK_VARIABLE)]
    return [child for child in idle if child.cpu_percent(0.5) < 5 and child.memory_info().rss > 250e6]


def restart_seconds(
    command: list[str], log: Path, word: str, ready: Callable[[subprocess.Popen[bytes]], bool]
) -> float:
    """Start a contestant, kill one of its ranks and return the seconds to the next step."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | NEW_STORE
    with (
        open(os.devnull, "wb") as devnull,
        subprocess.Popen(command, stdout=devnull, stderr=devnull, cwd=ROOT, env=environment) as process,
    ):
        try:
            wait(lambda: len(read_log(log)) >= KILL_STEP and ready(process), process)
            victim = list(processes_matching(process, word))[-1]
            killed = time.time()
            victim.kill()
            time.sleep(0.3)  # a step that was running may still be logged
            wait(lambda: read_log(log)[-1]["time"] > killed + 0.3, process, RESTART_TIMEOUT_S)
            return next(line["time"] for line in read_log(log) if line["time"] > killed + 0.3) - killed
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has already ended
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGINT)
                for child in psutil.wait_procs(children, timeout=30)[1]:
                    child.kill()


def main() -> None:
    """Print the ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder, run_numbers = Path(name), iter(range(1000))
        peer = folder / "peer.py"
        peer.write_text(PEER)
        pretrain = [
            sys.executable, "-m", "jobs.manta", "pretrain", f"runs_dir={folder}", "train.global_batch=2", "zero.stage=1",
            "tracking.enabled=false", "train.evaluate_samples=1",
        ]  # fmt: skip
        subprocess.run([*pretrain, "name=first", "train.max_steps=1"], check=True, capture_output=True, cwd=ROOT)

        def ours() -> float:
            run = f"ours{next(run_numbers)}"
            command = [
                *pretrain, f"name={run}", f"train.workers={WORKERS}", "train.max_steps=100000", "train.checkpoint_every=10",
            ]  # fmt: skip
            is_ready = lambda process: len(standby_processes(process)) >= WORKERS  # noqa: E731
            return restart_seconds(command, folder / run / "metrics.jsonl", "RayTrainWorker", is_ready)

        def torchrun() -> float:
            peer_folder = folder / f"peer{next(run_numbers)}"
            peer_folder.mkdir()
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}",
                "--max-restarts=3", str(peer), str(peer_folder), str(folder / "first" / "bundle"),
            ]  # fmt: skip
            return restart_seconds(command, peer_folder / "metrics.jsonl", str(peer), lambda process: True)

        show(interleave({"ours": ours, "torchrun": torchrun}, repeats=3), "s", "ours", {"torchrun": 1.0})


if __name__ == "__main__":
    main()

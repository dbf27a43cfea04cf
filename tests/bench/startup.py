"""Seconds from the command to the first step, against the sum of its unavoidable parts, each measured in its own process.

Parts: importing Ray Train, torch, DeepSpeed and the model's class; `ray.init`; `deepspeed.initialize` of llama_5m. The
start is bound by CPU time: each rank imports the packages, as do Ray Train's controller and the driver.
Predicted on two cores: 1.2 with one worker, 1.5 with two.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.interleaved import interleave, show

PRELUDE = "from cluster.environment import set_default_environment; set_default_environment(); import time; "
PARTS = {
    "imports": PRELUDE
    + "t = time.time(); import ray.train.torch, torch, deepspeed; from transformers import LlamaForCausalLM; print(time.time() - t)",
    "ray.init": PRELUDE
    + "import ray; t = time.time(); ray.init(address='local', include_dashboard=False, log_to_driver=False); print(time.time() - t)",
    "deepspeed.initialize": PRELUDE
    + "from engine.train.worker import single_process_group; from engine.train.zero import ZeroModel; from jobs.entry import compose;"
    "from engine.models.build import InputSpec, build_model; import deepspeed;"
    "c = compose('pretrain', []); m = build_model(c.model, InputSpec(vocab_size=4096), 'AutoModelForCausalLM', {}, 0); single_process_group();"
    "import time; t = time.time(); ZeroModel(m, c, 1, 'fp32'); print(time.time() - t)",
}


def part_seconds(name: str) -> float:
    """Return the seconds of one part."""
    process = subprocess.run([sys.executable, "-c", PARTS[name]], capture_output=True, text=True, check=True)
    return float(process.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        run_numbers = iter(range(1000))

        def first_step(workers: int) -> float:
            name = f"run{next(run_numbers)}"
            command = [
                sys.executable, "-m", "jobs.pretrain", f"runs_dir={folder}", f"name={name}", f"train.workers={workers}",
                "train.max_steps=1", "train.global_batch=2", "train.evaluate_samples=1", "tracking.enabled=false",
            ]  # fmt: skip
            start = time.time()
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
            line = json.loads((Path(folder) / name / "metrics.jsonl").read_text().splitlines()[0])
            return float(line["time"]) - start

        first_step(1)  # prepares the data
        seconds = interleave(
            {
                "sum of the parts": lambda: sum(part_seconds(name) for name in PARTS),
                "command to first step, 1 worker": lambda: first_step(1),
                "command to first step, 2 workers": lambda: first_step(2),
            }
        )
        for workers in ("1 worker", "2 workers"):
            show(seconds, "s", f"command to first step, {workers}", {"sum of the parts": 1.3})


if __name__ == "__main__":
    main()

"""Seconds from the command to the first step, against the sum of its unavoidable parts, each in a process of its own.

Parts: importing Ray Train, torch, DeepSpeed and transformers; `ray.init`; `deepspeed.initialize` of llama_5m. Predicted:
1.3 to 1.9, since two workers import on two cores while Ray Train's controller, its cleaner and the driver import too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.interleaved import interleave, show

PRELUDE = "from cluster.environment import quiet_environment; quiet_environment(); import time; "
PARTS = {
    "imports": PRELUDE
    + "t = time.time(); import ray.train.torch, torch, deepspeed, transformers.models.llama; print(time.time() - t)",
    "ray.init": PRELUDE
    + "import ray; t = time.time(); ray.init(address='local', include_dashboard=False, log_to_driver=False); print(time.time() - t)",
    "deepspeed.initialize": PRELUDE
    + "from engine.train.worker import *; from jobs.entry import compose; from engine.plan.plan import Vocabulary; import deepspeed;"
    "c = compose('pretrain', []); m = build(c.model, Vocabulary(4096), 'AutoModelForCausalLM', {}, 0); local_group();"
    "import time; t = time.time(); Sharded(m, c, 1, 'fp32'); print(time.time() - t)",
}


def part(name: str) -> float:
    """Return the seconds of one part."""
    done = subprocess.run([sys.executable, "-c", PARTS[name]], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        turn = iter(range(1000))

        def first_step() -> float:
            name = f"run{next(turn)}"
            command = [
                sys.executable, "-m", "jobs.pretrain", f"runs_dir={folder}", f"name={name}", "train.workers=2", "train.max_steps=1",
                "train.global_batch=2", "train.evaluate_samples=1", "tracking.enabled=false",
            ]  # fmt: skip
            began = time.time()
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
            line = json.loads((Path(folder) / name / "metrics.jsonl").read_text().splitlines()[0])
            return float(line["time"]) - began

        found = interleave(
            {"command to first step": first_step, "sum of the parts": lambda: sum(part(name) for name in PARTS)}
        )
        show(found, "s", "command to first step", {"sum of the parts": 1.3})


if __name__ == "__main__":
    main()

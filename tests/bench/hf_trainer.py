"""`manta pretrain` against Hugging Face's Trainer with DeepSpeed, each as a command in its own process.

The same model (llama_5m), shards, order, batch (16 x 256 tokens), ZeRO stage 1, precision, fused AdamW with clipping, one
process with all cores. The Trainer logs once, at the end, and loads samples in a worker process, as its documentation advises.
Predicted for the step: 1.4, compiled or not. The Trainer's attention, two fifths of its step, takes twice as long as ours; it
keeps all logits, also in fp32, and reads them some six times more often than our chunked loss (10 ms each of some 400); its
wrappers, callbacks and NaN check add a few milliseconds. Predicted for the command: 1.0 at 40 steps, as only ours starts Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.interleaved import interleave, show

STEPS, WARMUP_STEPS, BATCH, LENGTH = 40, 10, 16, 256
ROOT = Path(__file__).parents[2]
PEERS = Path(sys.prefix) / "peers"  # `make bench` installs accelerate there


def trainer(data: str, out: str, precision: str, compiled: str) -> None:
    """Run the peer: train, save the model, and print the time at which each step ended."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from engine.data.order import DataOrder
    from engine.data.packing import Blocks
    from engine.data.shards import Split
    from engine.data.tokenizer import load_tokenizer
    from engine.models.build import transformers_config
    from jobs.entry import compose

    config = compose("pretrain", [])
    blocks = Blocks(Split.open(Path(data), "train"), LENGTH)
    order = DataOrder(len(blocks), BATCH, config.seed)

    class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return STEPS * BATCH

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            tokens = torch.as_tensor(blocks[order.sample_ids(i // BATCH)[i % BATCH]]["tokens"][:LENGTH])
            return {"input_ids": tokens, "labels": tokens}

    ends: list[float] = []

    class StepTimer(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.time())

    deepspeed = {
        "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5_100_000}, "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=out, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-3, weight_decay=0.1,
        adam_beta2=0.95, max_grad_norm=1.0, lr_scheduler_type="cosine", warmup_steps=STEPS // 10, optim="adamw_torch_fused",
        bf16=precision == "bf16", use_cpu=not torch.cuda.is_available(), deepspeed=deepspeed, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
        dataloader_num_workers=1, dataloader_persistent_workers=True, torch_compile=compiled == "compiled",
    )  # fmt: skip
    set_seed(0)
    tokenizer = load_tokenizer(Path(data) / "tokenizer")
    model = AutoModelForCausalLM.from_config(
        transformers_config(config.model, tokenizer, {}), attn_implementation="sdpa"
    )
    hf_trainer = Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[StepTimer()])
    hf_trainer.train()
    hf_trainer.save_model(out)
    print(json.dumps(ends))


def steady_rate(ends: list[float]) -> float:
    """Return tokens per second from the end of step WARMUP_STEPS to that of the last."""
    return (len(ends) - WARMUP_STEPS) * BATCH * LENGTH / (ends[-1] - ends[WARMUP_STEPS - 1])


def run_ours(folder: str, name: str, precision: str, compiled: bool) -> tuple[float, float]:
    """Run `manta pretrain`; return its tokens per second after warm-up and the seconds of the command."""
    command = [
        sys.executable, "-m", "jobs.pretrain", f"runs_dir={folder}", f"name={name}", "zero.stage=1", f"train.max_steps={STEPS}",
        f"train.global_batch={BATCH}", f"train.micro_batch={BATCH}", f"train.precision={precision}", "train.evaluate_samples=1",
        "tracking.enabled=false", f"train.compile={compiled}",
    ]  # fmt: skip
    start = time.time()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    seconds = time.time() - start
    lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
    return steady_rate([json.loads(line)["time"] for line in lines]), seconds


def run_trainer(data: Path, out: str, precision: str, compiled: bool) -> tuple[float, float]:
    """Run the peer; return the same two numbers."""
    mode = "compiled" if compiled else "eager"
    command = [sys.executable, "-m", "tests.bench.hf_trainer", str(data), out, precision, mode]
    single_rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29571",
    }
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(PEERS)])}
    start = time.time()
    process = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=os.environ | single_rank | paths
    )
    seconds = time.time() - start
    return steady_rate(json.loads(process.stdout.strip().splitlines()[-1])), seconds


def compare(data: Path, folder: str, precision: str, compiled: bool, repeats: int) -> None:
    """Print the ratios after warm-up and of the whole command."""
    seconds: dict[str, list[float]] = {"ours": [], "Trainer": []}
    run_numbers = iter(range(1000))

    def measure(contestant: str) -> float:
        name = f"{precision}-{compiled}-{next(run_numbers)}"
        if contestant == "ours":
            rate, command_s = run_ours(folder, name, precision, compiled)
        else:
            rate, command_s = run_trainer(data, f"{folder}/{name}", precision, compiled)
        seconds[contestant].append(command_s)
        return rate

    rates = interleave({name: (lambda name=name: measure(name)) for name in seconds}, repeats=repeats)
    setting = f"{precision}, both compiled" if compiled else precision
    print(f"\n{setting}, ZeRO 1, {os.cpu_count()} cores, steps {WARMUP_STEPS + 1} to {STEPS}")
    show(rates, "tokens/s", "ours", {"Trainer": 1.3}, f"step, {setting}")
    print(f"the whole command, {STEPS} steps")
    command_rates = {name: [STEPS * BATCH * LENGTH / s for s in values[1:]] for name, values in seconds.items()}
    show(command_rates, "tokens/s", "ours", {"Trainer": 1.0}, f"whole command, {setting}")


def main() -> None:
    """Compare eager and compiled."""
    from cluster.environment import set_default_environment
    from engine.config import with_values
    from engine.data.prepare import prepare
    from engine.train.hardware import has_bf16
    from jobs.entry import compose

    if not PEERS.is_dir():
        raise SystemExit(f"{PEERS} lacks accelerate, which the Trainer needs: make bench installs it there")
    set_default_environment()
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(with_values(compose("pretrain", []), {"runs_dir": folder}))
        precision = "bf16" if has_bf16() else "fp32"
        compare(data, folder, precision, compiled=False, repeats=5)
        compare(data, folder, precision, compiled=True, repeats=3)


if __name__ == "__main__":
    trainer(*sys.argv[1:5]) if len(sys.argv) == 5 else main()

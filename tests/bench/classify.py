"""What a classify call costs beside its model's bare forward: client, proxy, ingress, replica and back; one call at a time.

bert_5m with fresh weights, texts of about 30 tokens, an endpoint with a key. The bare forward is the same `predict` on the
same threads in this process. Both medians are of calls that take turns. Target: 3 ms or less between them.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch

from cluster.environment import quiet_environment
from cluster.session import connect
from engine.config import Config, with_values
from engine.serve.deploy import deploy
from engine.serve.keys import new_key
from tests.bench.interleaved import record
from tests.engine.bundles.making import fresh_bundle

CALLS = 400
WARM_UP = 60
TARGET_MS = 3.0
MODEL = {
    "model.type": "bert", "model.hidden_size": 256, "model.num_hidden_layers": 5, "model.num_attention_heads": 8,
    "model.intermediate_size": 704, "model.max_position_embeddings": 512, "objective.name": "classification",
    "data.source": "python_functions", "data.max_documents": 400, "data.vocab_size": 4096, "tracking.enabled": False,
    "serve.max_replicas": 1, "serve.precision": "fp32",
}  # fmt: skip


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long it takes."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    """Print both medians and their difference."""
    quiet_environment()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        config = with_values(Config(), MODEL | {"runs_dir": str(folder), "name": "bench", "serve.port": port})
        bundle = fresh_bundle(config, folder / "namer" / "bundle")
        secret, _ = new_key(config.keys_file, "bench", 10**6, 10**9, None)
        torch.set_num_threads(max(1, round(config.serve.cpus_per_replica)))
        objective, model = bundle.objective(), bundle.model(torch.float32)
        stack.enter_context(connect("local", os.cpu_count(), False, folder / "logs"))
        endpoint = deploy(config, {"namer": bundle.folder})
        stack.callback(endpoint.stop)
        client = stack.enter_context(
            httpx.Client(base_url=endpoint.url, headers={"Authorization": f"Bearer {secret}"}, timeout=60)
        )
        dice, served, bare = random.Random(0), [], []
        for call in range(WARM_UP + CALLS):
            text = f"def area_{dice.randrange(1000)}(w, h):\n    return w * h + {dice.randrange(1000)}\n"
            took = milliseconds(lambda text=text: client.post("/v1/classify", json={"input": text}).raise_for_status())  # type: ignore[misc]
            took_bare = milliseconds(lambda text=text: objective.predict(model, [{"text": text}]))  # type: ignore[misc]
            if call >= WARM_UP:
                served.append(took)
                bare.append(took_bare)
    over = statistics.median(served) - statistics.median(bare)
    for name, values in (("classify call", served), ("bare forward", bare)):
        tenths = statistics.quantiles(values, n=10)
        print(
            f"{name:<14} {statistics.median(values):6.2f} ms  ({tenths[0]:.2f} to {tenths[-1]:.2f}, nine of ten and one)"
        )
    print(f"the call costs {over:.2f} ms more, target {TARGET_MS:.0f} ms")
    record(ours="classify call", against="bare forward", unit="ms", difference=over, target=TARGET_MS, repeats=CALLS)


if __name__ == "__main__":
    main()

"""Classification over HTTP: the overhead of a call over the model's forward, and the calls per second of 32 clients.

bert_5m with untrained weights, texts of about 30 tokens, an endpoint with an API key. The forward is the same `predict` on
as many threads in this process; both medians are of alternating calls, one at a time. Target: an overhead of 3 ms at most.
The throughput is compared with `fastapi_pipeline` on the same bundle, with one torch thread and with one per core; the
clients are the same, and the endpoints are measured in turns. Target: twice the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from cluster.environment import set_default_environment
from cluster.session import connect
from engine.config import Config, with_values
from engine.serve.deploy import deploy
from engine.serve.http.api_keys import new_key
from tests.bench.calls import Caller
from tests.bench.interleaved import interleave, record, show
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.ports import free_port

CALLS = 400
WARM_UP = 60
TARGET_MS = 3.0
CLIENTS = 32
TURN_S = 5.0
OURS, TARGET = "endpoint, 32 clients", 2.0
MODEL = {
    "model.type": "bert", "model.hidden_size": 256, "model.num_hidden_layers": 5, "model.num_attention_heads": 8,
    "model.intermediate_size": 704, "model.max_position_embeddings": 512, "objective.name": "classification",
    "data.source": "python_functions", "data.max_documents": 400, "data.vocab_size": 4096, "tracking.enabled": False,
    "serve.max_replicas": 1, "serve.precision": "fp32",
}  # fmt: skip


def random_input(rng: random.Random) -> str:
    """Return a short function as text."""
    return f"def area_{rng.randrange(1000)}(w, h):\n    return w * h + {rng.randrange(1000)}\n"


def elapsed_ms(work: Callable[[], object]) -> float:
    """Return the duration of a call."""
    started_at = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started_at)


def compare_latency(url: str, secret: str, predict: Callable[[str], object]) -> None:
    """Print the medians of calls and forwards, and their difference."""
    rng, call_times, forward_times = random.Random(0), [], []
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=60) as client:
        for call in range(WARM_UP + CALLS):
            text = random_input(rng)
            call_ms = elapsed_ms(lambda text=text: client.post("/v1/classify", json={"input": text}).raise_for_status())  # type: ignore[misc]
            forward_ms = elapsed_ms(lambda text=text: predict(text))  # type: ignore[misc]
            if call >= WARM_UP:
                call_times.append(call_ms)
                forward_times.append(forward_ms)
    overhead_ms = statistics.median(call_times) - statistics.median(forward_times)
    for name, values in (("classify call", call_times), ("bare forward", forward_times)):
        deciles = statistics.quantiles(values, n=10)
        print(
            f"{name:<14} {statistics.median(values):6.2f} ms  (10th to 90th percentile: {deciles[0]:.2f} to {deciles[-1]:.2f})"
        )
    print(f"overhead of a call: {overhead_ms:.2f} ms, target {TARGET_MS:.0f} ms")
    record(
        ours="classify call", against="bare forward", unit="ms", difference=overhead_ms, target=TARGET_MS, repeats=CALLS
    )


async def calls_per_second(port: int, secret: str) -> float:
    """Return the rate of responses to `CLIENTS` clients."""
    rng, deadline = random.Random(0), time.perf_counter() + TURN_S

    async def send_calls() -> int:
        count = 0
        async with Caller(port, secret) as caller:
            while time.perf_counter() < deadline:
                response = await caller.post("/v1/classify", {"input": random_input(rng)})
                assert response["data"][0]["scores"]
                count += 1
        return count

    started_at = time.perf_counter()
    completed = sum(await asyncio.gather(*(send_calls() for _ in range(CLIENTS))))
    return completed / (time.perf_counter() - started_at)


@contextlib.contextmanager
def peer(folder: Path, threads: int) -> Iterator[int]:
    """Serve a bundle with `fastapi_pipeline`; yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.fastapi_pipeline", str(folder), str(port), str(threads)]
    with subprocess.Popen(command) as process:
        try:
            while True:
                assert process.poll() is None
                with contextlib.suppress(httpx.HTTPError):
                    httpx.post(
                        f"http://127.0.0.1:{port}/v1/classify", json={"input": "x"}, timeout=60
                    ).raise_for_status()
                    break
                time.sleep(0.2)
            yield port
        finally:
            process.kill()


def compare_throughput(port: int, secret: str, folder: Path) -> None:
    """Print the calls per second of `CLIENTS` clients, with each endpoint."""
    with contextlib.ExitStack() as stack:
        threads = sorted({1, os.cpu_count() or 1})
        ports = {OURS: port} | {f"FastAPI + pipeline, threads {n}": stack.enter_context(peer(folder, n)) for n in threads}  # fmt: skip

        def measure(port: int) -> Callable[[], float]:
            return lambda: asyncio.run(calls_per_second(port, secret))

        rates = interleave({name: measure(port) for name, port in ports.items()})
    show(rates, "calls/s", OURS, dict.fromkeys(list(ports)[1:], TARGET), f"{CLIENTS} clients")


def main() -> None:
    """Print overhead and throughput."""
    set_default_environment()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = with_values(Config(), MODEL | {"runs_dir": str(folder), "name": "bench", "serve.port": free_port()})
        bundle = fresh_bundle(config, folder / "namer" / "bundle")
        secret, _ = new_key(config.keys_file, "bench", 10**6, 10**9, None)
        torch.set_num_threads(max(1, round(config.serve.cpus_per_replica)))
        objective, model = bundle.objective(), bundle.model(torch.float32)
        stack.enter_context(connect("local", os.cpu_count(), False, folder / "logs"))
        endpoint = deploy(config, {"namer": bundle.folder})
        stack.callback(endpoint.stop)

        def predict(text: str) -> Any:
            return objective.predict(model, [{"text": text}])

        compare_latency(endpoint.url, secret, predict)
        compare_throughput(config.serve.port, secret, bundle.folder)


if __name__ == "__main__":
    main()

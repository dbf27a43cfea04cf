"""Classification over HTTP: what a call costs beside its model's bare forward, and how many calls a second 32 clients get.

bert_5m with fresh weights, texts of about 30 tokens, an endpoint with a key. The bare forward is the same `predict` on the
same threads in this process; both medians are of calls that take turns, one at a time. Target: 3 ms or less between them.
The throughput is beside that of `fastapi_pipeline` with one thread of torch's and with as many as there are cores, on the
same bundle; the clients are the same, and the endpoints take turns. Target: twice as many.
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

from cluster.environment import quiet_environment
from cluster.session import connect
from engine.config import Config, with_values
from engine.serve.deploy import deploy
from engine.serve.http.api_keys import new_key
from tests.bench.calls import Caller
from tests.bench.interleaved import interleave, record, show
from tests.engine.bundles.making import fresh_bundle
from tests.ports import free_port

CALLS = 400
WARM_UP = 60
TARGET_MS = 3.0
CLIENTS = 32
SECONDS = 5.0  # of a turn
OURS, TARGET = "endpoint, 32 clients", 2.0
MODEL = {
    "model.type": "bert", "model.hidden_size": 256, "model.num_hidden_layers": 5, "model.num_attention_heads": 8,
    "model.intermediate_size": 704, "model.max_position_embeddings": 512, "objective.name": "classification",
    "data.source": "python_functions", "data.max_documents": 400, "data.vocab_size": 4096, "tracking.enabled": False,
    "serve.max_replicas": 1, "serve.precision": "fp32",
}  # fmt: skip


def text(dice: random.Random) -> str:
    """Return an input."""
    return f"def area_{dice.randrange(1000)}(w, h):\n    return w * h + {dice.randrange(1000)}\n"


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long it takes."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def alone(url: str, secret: str, predict: Callable[[str], object]) -> None:
    """Print both medians and their difference."""
    dice, served, bare = random.Random(0), [], []
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=60) as client:
        for call in range(WARM_UP + CALLS):
            asked = text(dice)
            took = milliseconds(
                lambda asked=asked: client.post("/v1/classify", json={"input": asked}).raise_for_status()
            )  # type: ignore[misc]
            took_bare = milliseconds(lambda asked=asked: predict(asked))  # type: ignore[misc]
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


async def calls_a_second(port: int, secret: str) -> float:
    """Return how many answers `CLIENTS` clients get a second."""
    dice, until = random.Random(0), time.perf_counter() + SECONDS

    async def ask() -> int:
        count = 0
        async with Caller(port, secret) as caller:
            while time.perf_counter() < until:
                answer = await caller.post("/v1/classify", {"input": text(dice)})
                assert answer["data"][0]["scores"]
                count += 1
        return count

    began = time.perf_counter()
    answered = sum(await asyncio.gather(*(ask() for _ in range(CLIENTS))))
    return answered / (time.perf_counter() - began)


@contextlib.contextmanager
def peer(folder: Path, threads: int) -> Iterator[int]:
    """Serve a bundle by the peer; give its port."""
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


def together(port: int, secret: str, folder: Path) -> None:
    """Print calls a second at `CLIENTS` clients, ours and theirs."""
    with contextlib.ExitStack() as stack:
        threads = sorted({1, os.cpu_count() or 1})
        ports = {OURS: port} | {f"FastAPI + pipeline, threads {n}": stack.enter_context(peer(folder, n)) for n in threads}  # fmt: skip

        def measure(port: int) -> Callable[[], float]:
            return lambda: asyncio.run(calls_a_second(port, secret))

        found = interleave({name: measure(port) for name, port in ports.items()})
    show(found, "calls/s", OURS, dict.fromkeys(list(ports)[1:], TARGET), f"{CLIENTS} clients")


def main() -> None:
    """Print both."""
    quiet_environment()
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

        def predict(asked: str) -> Any:
            return objective.predict(model, [{"text": asked}])

        alone(endpoint.url, secret, predict)
        together(config.serve.port, secret, bundle.folder)


if __name__ == "__main__":
    main()

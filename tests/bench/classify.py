"""What classification costs beside its model: of one call at a time, and of 32 clients at once.

bert_5m with fresh weights, texts of about 30 tokens, an endpoint with a key. One call at a time: client, ingress, replica
and back, against the same `predict` on the same threads in this process; both medians are of calls that take turns. Target:
3 ms or less between them. 32 clients at once: requests/s against a plain FastAPI application with a transformers pipeline
under uvicorn, in a process of its own, same model, same threads, same clients, in turns. Target: 2.0.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch

from cluster.environment import quiet_environment
from cluster.session import connect
from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.serve.deploy import deploy
from engine.serve.keys import new_key
from tests.bench.interleaved import interleave, record, show
from tests.engine.bundles.making import fresh_bundle

CALLS = 400
WARM_UP = 60
TARGET_MS = 3.0
CLIENTS, EACH, REPEATS, TARGET = 32, 12, 5, 2.0
OURS, PEER = "manta", "FastAPI + pipeline"
MODEL = {
    "model.type": "bert", "model.hidden_size": 256, "model.num_hidden_layers": 5, "model.num_attention_heads": 8,
    "model.intermediate_size": 704, "model.max_position_embeddings": 512, "objective.name": "classification",
    "data.source": "python_functions", "data.max_documents": 400, "data.vocab_size": 4096, "tracking.enabled": False,
    "serve.max_replicas": 1, "serve.precision": "fp32",
}  # fmt: skip
dice = random.Random(0)


def text() -> str:
    """Return another one of about 30 tokens."""
    return f"def area_{dice.randrange(1000)}(w, h):\n    return w * h + {dice.randrange(1000)}\n"


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long it takes."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def free_port() -> int:
    """Return one of loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve_plainly(folder: str, port: int, threads: int) -> None:
    """Serve a bundle as FastAPI's and transformers' own examples do; FastAPI runs the function in a pool of threads."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from transformers import pipeline

    class Body(BaseModel):
        input: str

    torch.set_num_threads(threads)
    classify, app = pipeline("text-classification", model=folder, top_k=None), FastAPI()

    def answer(body: Body) -> list[dict[str, object]]:
        return list(classify(body.input))

    app.add_api_route("/v1/classify", answer, methods=["POST"])
    uvicorn.run(app, port=port, access_log=False, log_level="error")


@contextlib.contextmanager
def peer(folder: Path, threads: int) -> Iterator[int]:
    """Have the plain application run in a process of its own; yield its port."""
    port = free_port()
    command = [sys.executable, "-c", f"from tests.bench.classify import serve_plainly; serve_plainly({str(folder)!r}, {port}, {threads})"]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def requests_per_s(port: int, headers: dict[str, str]) -> float:
    """Have all clients ask, each on a connection of its own, and return how many answers came a second."""

    def ask(texts: list[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for it in texts:
            connection.request("POST", "/v1/classify", json.dumps({"input": it}), headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
        connection.close()

    texts = [[text() for _ in range(EACH)] for _ in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        took = milliseconds(lambda: list(pool.map(ask, texts)))
    return 1000 * CLIENTS * EACH / took


def one_at_a_time(client: httpx.Client, bundle: Bundle) -> None:
    """Print both medians and their difference."""
    objective, model = bundle.objective(), bundle.model(torch.float32)
    served, bare = [], []
    for call in range(WARM_UP + CALLS):
        it = text()
        took = milliseconds(lambda it=it: client.post("/v1/classify", json={"input": it}).raise_for_status())  # type: ignore[misc]
        took_bare = milliseconds(lambda it=it: objective.predict(model, [{"text": it}]))  # type: ignore[misc]
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


def main() -> None:
    """Measure both."""
    quiet_environment()
    with contextlib.ExitStack() as stack:
        folder, port = Path(stack.enter_context(tempfile.TemporaryDirectory())), free_port()
        config = with_values(Config(), MODEL | {"runs_dir": str(folder), "name": "bench", "serve.port": port})
        bundle = fresh_bundle(config, folder / "namer" / "bundle")
        secret, _ = new_key(config.keys_file, "bench", 10**6, 10**9, None)
        threads = max(1, round(config.serve.cpus_per_replica))
        torch.set_num_threads(threads)
        stack.enter_context(connect("local", os.cpu_count(), False, folder / "logs"))
        endpoint = deploy(config, {"namer": bundle.folder})
        stack.callback(endpoint.stop)
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        one_at_a_time(stack.enter_context(httpx.Client(base_url=endpoint.url, headers=headers, timeout=60)), bundle)
        other = stack.enter_context(peer(bundle.folder, threads))
        contestants = {OURS: lambda: requests_per_s(port, headers), PEER: lambda: requests_per_s(other, headers)}
        show(interleave(contestants, REPEATS), "requests/s", OURS, {PEER: TARGET}, setting=f"{CLIENTS} clients")


if __name__ == "__main__":
    main()

"""Tokens per second over HTTP: `manta deploy` compared with `transformers serve` and its continuous batching, same bundle.

16 clients of /v1/completions, each sending one request after the other: prompts of 4 to 32 words of two or three tokens,
16 to 128 new tokens, llama_5m with untrained weights in fp32, greedy; whole responses and streams.
The peer's cache and batch are sized by hand. Tokens are counted by the usage in the responses. Target: 4x on a CPU, 1.3x
on a GPU. Where MANTA_VLLM_PYTHON names a Python with vLLM, our endpoint with our engine and with vLLM's is compared with
`vllm serve` too; targets: 0.9 and 1.0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from cluster.environment import set_default_environment
from cluster.session import connect
from engine.config import Config, with_values
from engine.serve.deploy import deploy
from engine.serve.http.api_keys import new_key
from tests.bench.calls import Caller
from tests.bench.interleaved import interleave, show
from tests.engine.bundles.small_bundles import fresh_bundle
from tests.ports import free_port

CLIENTS, REQUESTS = 16, 4  # sequential requests of each client
OURS, THEIRS = "manta deploy", "transformers serve"
VLLM_ENGINE, VLLM_SERVE = "manta deploy, vLLM", "vllm serve"
TARGET = 4.0
MODEL = {
    "model.hidden_size": 256, "model.num_hidden_layers": 5, "model.num_attention_heads": 8, "model.num_key_value_heads": 8,
    "model.intermediate_size": 704, "model.max_position_embeddings": 512, "data.source": "python_functions",
    "data.max_documents": 400, "data.vocab_size": 4096, "data.sequence_length": 512, "tracking.enabled": False,
    "serve.max_replicas": 1, "serve.precision": "fp32", "serve.cpus_per_replica": os.cpu_count(),
}  # fmt: skip
CACHE_ARGS = ["--cb-num-blocks", "128", "--cb-max-batch-tokens", "256"]  # blocks of 32 tokens: room for 16 sequences


VLLM = os.environ.get("MANTA_VLLM_PYTHON")  # a Python with vLLM; unset: vLLM is left out


def transformers_serve(folder: Path, port: int) -> list[str]:
    """Return the command of transformers' endpoint."""
    return [
        str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--continuous-batching", *CACHE_ARGS,
        "--device", "cpu", "--dtype", "float32", "--port", str(port), "--log-level", "error",
    ]  # fmt: skip


def vllm_serve(folder: Path, port: int) -> list[str]:
    """Return the command of vLLM's endpoint, on all cores."""
    environment = [
        "env",
        f"OMP_NUM_THREADS={os.cpu_count()}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU=0",
        "VLLM_CPU_KVCACHE_SPACE=1",
    ]
    return [
        *environment, "VLLM_NO_USAGE_STATS=1", str(Path(VLLM or "").with_name("vllm")), "serve", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", str(CLIENTS),
    ]  # fmt: skip


@contextlib.contextmanager
def peer(command: Callable[[Path, int], list[str]], folder: Path) -> Iterator[int]:
    """Run another endpoint; yield its port."""
    port, log_file = free_port(), folder.parent / f"{command.__name__}.log"
    with (
        log_file.open("w") as log,
        subprocess.Popen(command(folder, port), stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            while True:
                assert process.poll() is None, log_file.read_text()
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).raise_for_status()
                    break
                time.sleep(0.2)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGKILL)


async def tokens_per_second(port: int, secret: str, model: str, rng: random.Random, stream: bool) -> float:
    """Return the clients' tokens per second, from the first request to the last response."""

    async def run_client(caller: Caller) -> int:
        return sum([await complete(caller) for _ in range(REQUESTS)])

    async def complete(caller: Caller) -> int:
        words = [f"v{rng.randrange(1000)}" for _ in range(rng.randrange(4, 33))]
        body = {"model": model, "prompt": " ".join(words), "max_tokens": rng.randrange(16, 129), "temperature": 0, "stream": stream}  # fmt: skip
        if stream:
            body["stream_options"] = {"include_usage": True}
            response = (await caller.stream("/v1/completions", body))[-1]
        else:
            response = await caller.post("/v1/completions", body)
        count: int = response["usage"]["completion_tokens"]
        return count

    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(port, secret)) for _ in range(CLIENTS)]
        started_at = time.perf_counter()
        counts = await asyncio.gather(*map(run_client, callers))
        return sum(counts) / (time.perf_counter() - started_at)


def main() -> None:
    """Print the ratios."""
    set_default_environment()
    rng = random.Random(0)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = with_values(Config(), MODEL | {"runs_dir": str(folder), "name": "bench", "serve.port": free_port()})
        bundle = fresh_bundle(config, folder / "writer" / "bundle")
        secret, _ = new_key(config.keys_file, "bench", 10**6, 10**9, None)
        stack.enter_context(
            connect("local", 2 * (os.cpu_count() or 1), False, folder / "logs")
        )  # one of two runs at a time
        endpoints: dict[str, tuple[int, str, str]] = {}

        def rate(name: str, stream: bool) -> Callable[[], float]:
            return lambda: asyncio.run(tokens_per_second(*endpoints[name], random.Random(rng.randrange(2**30)), stream))

        def compare(ours: str, theirs: dict[str, float]) -> None:
            for mode, stream in (("whole responses", False), ("streams", True)):
                print(mode)
                rates = interleave({name: rate(name, stream) for name in (ours, *theirs)}, 7)
                show(rates, "tokens/s", ours, theirs, mode)

        def theirs(command: Callable[[Path, int], list[str]]) -> tuple[int, str, str]:
            return stack.enter_context(peer(command, bundle.folder)), "", str(bundle.folder)

        endpoint = deploy(config, {"writer": bundle.folder})
        endpoints[OURS] = (config.serve.port, secret, "writer")
        endpoints[THEIRS] = theirs(transformers_serve)
        compare(OURS, {THEIRS: TARGET})
        if VLLM:
            by_vllm = with_values(config, {"serve.generator": "vllm", "serve.vllm_python": VLLM})
            deploy(by_vllm, {"by-vllm": bundle.folder})
            endpoints[VLLM_ENGINE] = (config.serve.port, secret, "by-vllm")
            endpoints[VLLM_SERVE] = theirs(vllm_serve)
            compare(OURS, {VLLM_SERVE: 0.9})
            compare(VLLM_ENGINE, {VLLM_SERVE: 1.0})
        endpoint.stop()


if __name__ == "__main__":
    main()

"""Tokens a second over HTTP: `manta deploy` beside `transformers serve` with its continuous batching, the same bundle.

16 clients of /v1/completions, each with one request after the other: prompts of 4 to 32 words of two or three tokens, 16 to
128 new tokens, llama_5m with fresh weights in fp32, greedy; whole answers and streams; ours with and without serve.compile.
The peer's cache and batch are sized by hand. Both are counted by the tokens that their answers tell. Target: 4x on a CPU,
1.3x on a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from cluster.environment import quiet_environment
from cluster.session import connect
from engine.config import Config, with_values
from engine.serve.deploy import deploy
from engine.serve.keys import new_key
from tests.bench.calls import Caller
from tests.bench.interleaved import interleave, show
from tests.engine.bundles.making import fresh_bundle
from tests.ports import free_port

CLIENTS, REQUESTS = 16, 4  # requests of each, one after the other
OURS, THEIRS = "manta deploy", "transformers serve"
TARGET = 4.0
MODEL = {
    "model.hidden_size": 256, "model.num_hidden_layers": 5, "model.num_attention_heads": 8, "model.num_key_value_heads": 8,
    "model.intermediate_size": 704, "model.max_position_embeddings": 512, "data.source": "python_functions",
    "data.max_documents": 400, "data.vocab_size": 4096, "data.sequence_length": 512, "tracking.enabled": False,
    "serve.max_replicas": 1, "serve.precision": "fp32", "serve.cpus_per_replica": os.cpu_count(),
}  # fmt: skip
SIZED = ["--cb-num-blocks", "128", "--cb-max-batch-tokens", "256"]  # blocks of 32 tokens: 16 sequences fit


@contextlib.contextmanager
def peer(folder: Path) -> Iterator[int]:
    """Run `transformers serve`; give its port."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--continuous-batching", *SIZED,
        "--device", "cpu", "--dtype", "float32", "--port", str(port), "--log-level", "error",
    ]  # fmt: skip
    with (folder.parent / "peer.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            while True:
                assert process.poll() is None, (folder.parent / "peer.log").read_text()
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).raise_for_status()
                    break
                time.sleep(0.2)
            yield port
        finally:
            process.kill()


async def tokens_a_second(port: int, secret: str, model: str, dice: random.Random, stream: bool) -> float:
    """Return how many tokens a second the clients get, from the first question to the last answer."""

    async def ask(caller: Caller) -> int:
        return sum([await answered(caller) for _ in range(REQUESTS)])

    async def answered(caller: Caller) -> int:
        words = [f"v{dice.randrange(1000)}" for _ in range(dice.randrange(4, 33))]
        body = {"model": model, "prompt": " ".join(words), "max_tokens": dice.randrange(16, 129), "temperature": 0, "stream": stream}  # fmt: skip
        if stream:
            body["stream_options"] = {"include_usage": True}
            answer = (await caller.stream("/v1/completions", body))[-1]
        else:
            answer = await caller.post("/v1/completions", body)
        count: int = answer["usage"]["completion_tokens"]
        return count

    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(port, secret)) for _ in range(CLIENTS)]
        began = time.perf_counter()
        counts = await asyncio.gather(*map(ask, callers))
        return sum(counts) / (time.perf_counter() - began)


def main() -> None:
    """Print the ratios."""
    quiet_environment()
    dice = random.Random(0)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = with_values(Config(), MODEL | {"runs_dir": str(folder), "name": "bench", "serve.port": free_port()})
        bundle = fresh_bundle(config, folder / "writer" / "bundle")
        secret, _ = new_key(config.keys_file, "bench", 10**6, 10**9, None)
        stack.enter_context(connect("local", os.cpu_count(), False, folder / "logs"))
        asked = {
            OURS: (config.serve.port, secret, "writer"),
            THEIRS: (stack.enter_context(peer(bundle.folder)), "", str(bundle.folder)),
        }

        def rate(name: str, stream: bool) -> Callable[[], float]:
            return lambda: asyncio.run(tokens_a_second(*asked[name], random.Random(dice.randrange(2**30)), stream))

        for compiled in (False, True):
            endpoint = deploy(with_values(config, {"serve.compile": compiled}), {"writer": bundle.folder})
            for answers, stream in (("whole answers", False), ("streams", True)):
                setting = answers + (", compiled" if compiled else "")
                print(setting)
                found = interleave({name: rate(name, stream) for name in asked}, 7)
                show(found, "tokens/s", OURS, {THEIRS: TARGET}, setting)
            endpoint.stop()


if __name__ == "__main__":
    main()

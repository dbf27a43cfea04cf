"""Runs vLLM under the Python of an environment that has it; `vllm_generator` starts it, with the number of a socket.

That environment has nothing of Manta's, so this imports the standard library and vLLM alone. Lines of JSON go both ways:
first what the engine is to be, answered by "ready" or "refused"; then "add" and "drop", and back after each step its
"news". The process ends with the one that started it: at the end of its socket. The engine runs within it, step by step.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import queue
import socket
import sys
import threading
from typing import Any, get_args

MEMORY_SHARE = 0.25  # of a CPU's free memory, at most, for a cache whose size is not given

Told = dict[str, Any]


class Link:
    """The socket to the process that started this one."""

    def __init__(self, number: int) -> None:
        """Take the socket's file descriptor, and begin to read."""
        self.socket = socket.socket(fileno=number)
        self.asked: queue.SimpleQueue[Told] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self.socket.makefile("rb") as lines:
            for line in lines:
                self.asked.put(json.loads(line))
        os._exit(0)  # whatever the engine is at: nobody is left to hear of it

    def send(self, told: Told) -> None:
        """Send a line."""
        self.socket.sendall(json.dumps(told, separators=(",", ":")).encode() + b"\n")

    def take(self, wait: bool) -> list[Told]:
        """Return what was asked since; if nothing was and `wait`, what is asked next."""
        taken = [self.asked.get()] if wait else []
        while not self.asked.empty():
            taken.append(self.asked.get())
        return taken


class Refused(Exception):
    """What was asked can't be made, for a reason that the user can mend."""


class Worker:
    """A vLLM engine, and the completions in it by their numbers."""

    def __init__(self, asked: Told) -> None:
        """Make the engine. Raises Refused for an argument that vLLM doesn't have, and whatever vLLM raises."""
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = asked["arguments"] | lora_arguments(asked["lora"])
        known = [field.name for field in dataclasses.fields(EngineArgs)]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise Refused(f"serve.vllm_options.{name} is none of this vLLM's engine arguments{hint}")
        config = EngineArgs(**arguments).create_engine_config()
        size_cache(config, asked["cache_tokens"])
        self.engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self.config, self.eos_ids = config, asked["eos_ids"]
        self.adapters: dict[str, str] = asked["adapters"]  # folders
        self.numbers = {name: i + 1 for i, name in enumerate(self.adapters)}
        self.own: dict[str, tuple[str, Told]] = {}  # number -> vLLM's name for it, and what was asked
        self.steps = self.rows = 0

    def about(self) -> Told:
        """Return what the engine has come to be."""
        import vllm

        cache = self.config.cache_config
        device = self.config.device_config.device_type
        return {
            "cache_tokens": (cache.num_gpu_blocks - 1) * cache.block_size,  # one block is never used
            "positions": self.config.model_config.max_model_len, "device": device, "vllm": vllm.__version__,
        }  # fmt: skip

    def heed(self, asked: Told) -> list[Any]:
        """Add or drop a completion; return the news of one that can't be added."""
        if "drop" in asked:
            gone = [self.own.pop(number)[0] for number in asked["drop"] if number in self.own]
            self.engine.abort_request(gone, internal=True)
            return []
        try:
            name = self.engine.add_request(
                asked["number"], {"prompt_token_ids": asked["prompt"]}, self._sampling(asked), lora_request=self._adapter(asked["adapter"])
            )  # fmt: skip
        except Exception as error:  # of this request alone
            return [[asked["number"], [], "error", [], [], 0, f"{type(error).__name__}: {error}"]]
        self.own[asked["number"]] = (name, asked)
        return []

    def _sampling(self, asked: Told) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        schema, bias = asked["schema"], asked["bias"]
        return SamplingParams(
            **asked["sampling"], logit_bias={int(token): it for token, it in bias.items()} if bias else None,
            max_tokens=max(asked["max_tokens"], 1), seed=asked["seed"], logprobs=asked["logprobs"],
            prompt_logprobs=(asked["logprobs"] or 0) if asked["score_prompt"] else None,
            ignore_eos=True, stop_token_ids=self.eos_ids, detokenize=False, output_kind=RequestOutputKind.DELTA,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
        )  # fmt: skip

    def _adapter(self, name: str) -> Any:
        if not name:
            return None
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, self.numbers[name], self.adapters[name])
        self.engine.add_lora(request)  # here, where an error is one request's
        return request

    def step(self) -> list[Any]:
        """Run the engine once; return [number, tokens, reason, scores, scores of the prompt, reused, error] of each."""
        self.steps += 1
        news = [self._news(output) for output in self.engine.step()]
        self.rows += len(news)
        return [it for it in news if it]

    def _news(self, output: Any) -> list[Any] | None:
        name, asked = self.own.get(output.request_id, (None, {}))
        if name is None:
            return None
        written, prompt = output.outputs[0], asked["prompt"]
        most = asked["logprobs"] or 0
        tokens, reason = list(written.token_ids), written.finish_reason
        scores = [score(token, found, most) for token, found in zip(tokens, written.logprobs or [])]
        if reason == "stop":
            tokens.pop()  # the token that ended it
        read = enumerate(output.prompt_logprobs or [])
        of_prompt = [score(prompt[i], found, most) for i, found in read if found]
        if not asked["max_tokens"]:
            tokens, scores, reason = [], [], "length"
        if output.finished:
            del self.own[output.request_id]
        return [output.request_id, tokens, reason, scores, of_prompt, output.num_cached_tokens or 0, ""]


def lora_arguments(lora: Told | None) -> Told:
    """Return the engine arguments for `most` of `all` adapters, of a `rank` on some `layers`."""
    if lora is None:
        return {}
    from vllm.config.lora import MaxLoRARanks
    from vllm.platforms import current_platform

    sizes = [size for size in get_args(MaxLoRARanks) if size >= lora["rank"]]
    if not sizes:
        raise Refused(f"an adapter has rank {lora['rank']}, and vLLM takes {max(get_args(MaxLoRARanks))} at most")
    # On a CPU, vLLM gives rows without an adapter that of the last place, which is therefore left empty.
    most = lora["all"] + 1 if current_platform.is_cpu() else lora["most"]
    return {
        "enable_lora": True, "max_loras": most, "max_cpu_loras": most, "max_lora_rank": min(sizes),
        "lora_target_modules": lora["layers"],
    }  # fmt: skip


def size_cache(config: Any, tokens: int | None) -> None:
    """Bound the cache by so many tokens; None: by all that may run together, on a CPU, and on a GPU as vLLM does."""
    cache, model = config.cache_config, config.model_config
    if tokens is not None:
        cache.num_gpu_blocks_override = -(-(tokens + 1) // cache.block_size) + 1
    if config.device_config.device_type != "cpu" or cache.kv_cache_memory_bytes is not None:
        return
    import psutil

    parallel = config.parallel_config
    heads, width = model.get_num_kv_heads(parallel), model.get_head_size()
    token_bytes = 2 * model.get_num_layers(parallel) * heads * width * model.dtype.itemsize
    blocks = config.scheduler_config.max_num_seqs * -(-model.max_model_len // cache.block_size) + 1
    whole = blocks * cache.block_size * token_bytes
    cache.kv_cache_memory_bytes = min(whole, int(MEMORY_SHARE * psutil.virtual_memory().available))


def score(token: int, found: dict[int, Any], most: int) -> list[Any]:
    """Return [token, log-probability, [[token, log-probability] of the `most` likeliest]]."""
    best = sorted(((it.rank, other, it.logprob) for other, it in found.items() if it.rank <= most))
    return [token, found[token].logprob, [[other, logprob] for _, other, logprob in best]]


def main(number: int) -> None:
    """Make an engine as the first line asks, and run it."""
    link = Link(number)
    (asked,) = [link.asked.get()]
    try:
        worker = Worker(asked)
    except Exception as error:
        link.send({"refused": str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"})
        raise
    link.send({"ready": worker.about()})
    while True:
        news: list[Any] = []
        for asked in link.take(wait=not worker.own):
            news += worker.heed(asked)
        if worker.own:
            news += worker.step()
        if news:
            link.send({"news": news, "steps": worker.steps, "rows": worker.rows})


if __name__ == "__main__":
    main(int(sys.argv[1]))

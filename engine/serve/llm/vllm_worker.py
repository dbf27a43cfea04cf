"""Runs vLLM under the Python of an environment that has it; started by `vllm_engine`, with the number of a socket.

That environment has nothing of Manta's, so this file imports the standard library and vLLM only. The messages below cross
the socket as lines of JSON. To the worker: {"setup": EngineSetup} first, then {"add": SequenceRequest} and {"abort": [ids]}.
Back: {"ready": EngineInfo} or {"refused": reason} first, then {"outputs": [SequenceOutput], "steps", "rows"} after each
step. The engine runs within this process, step by step; the process ends with the one that started it, at the end of its
socket.
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
from dataclasses import dataclass
from typing import Any, get_args

MEMORY_SHARE = 0.25  # of a CPU's free memory, at most, for a KV cache whose size is not given

Message = dict[str, Any]
Logprobs = list[Any]  # [token, log-probability, [[token, log-probability] of the likeliest]]


@dataclass
class LoraSetup:
    """What the engine has to have room for."""

    max_rank: int
    modules: list[str]  # last parts of the layers' paths
    max_loaded: int  # adapters in memory at once
    num_adapters: int


@dataclass
class EngineSetup:
    """The engine that the worker makes."""

    arguments: dict[str, Any]  # vLLM's engine arguments
    eos_ids: list[int]
    kv_cache_tokens: int | None  # None: sized by the memory
    adapters: dict[str, str]  # name -> folder
    lora: LoraSetup | None


@dataclass
class EngineInfo:
    """The engine that was made."""

    cache_tokens: int
    max_positions: int
    device: str
    vllm: str  # version


@dataclass
class SequenceRequest:
    """A sequence to generate."""

    id: str
    prompt: list[int]
    max_tokens: int
    seed: int | None
    sampling: dict[str, Any]  # vLLM's SamplingParams
    logit_bias: dict[str, float]  # by token
    num_logprobs: int | None
    needs_prompt_logprobs: bool
    adapter: str  # "": none
    json_schema: Any  # None: no structured output


@dataclass
class SequenceOutput:
    """What a step brought for a sequence."""

    id: str
    tokens: list[int]
    finish_reason: str | None
    logprobs: list[Logprobs]
    prompt_logprobs: list[Logprobs]
    num_cached_tokens: int
    error: str = ""


class Link:
    """The socket to the process that started this one."""

    def __init__(self, fileno: int) -> None:
        """Take the socket's file descriptor, and start to read."""
        self.socket = socket.socket(fileno=fileno)
        self.received: queue.SimpleQueue[Message] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self.socket.makefile("rb") as lines:
            for line in lines:
                self.received.put(json.loads(line))
        os._exit(0)  # even in the middle of a step: nobody is left to read the outputs

    def send(self, message: Message) -> None:
        """Send a message."""
        self.socket.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def receive(self, wait: bool) -> list[Message]:
        """Return the messages that have come; with `wait`, at least one."""
        messages = [self.received.get()] if wait else []
        while not self.received.empty():
            messages.append(self.received.get())
        return messages


class SetupRefused(Exception):
    """The engine can't be made, for a reason that the user can fix."""


class Worker:
    """A vLLM engine, and the sequences in it by their ids."""

    def __init__(self, setup: EngineSetup) -> None:
        """Make the engine. Raises SetupRefused for an argument that vLLM doesn't have, and whatever vLLM raises."""
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments = setup.arguments | lora_arguments(setup.lora)
        known = [field.name for field in dataclasses.fields(EngineArgs)]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise SetupRefused(f"serve.vllm_options.{name} is none of this vLLM's engine arguments{hint}")
        config = EngineArgs(**arguments).create_engine_config()
        size_cache(config, setup.kv_cache_tokens)
        self.engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self.config, self.eos_ids = config, setup.eos_ids
        self.adapters = setup.adapters
        self.adapter_ids = {name: i + 1 for i, name in enumerate(self.adapters)}
        self.sequences: dict[str, tuple[str, SequenceRequest]] = {}  # id -> vLLM's id, and the request
        self.num_steps = self.num_rows = 0

    def info(self) -> EngineInfo:
        """Return what the engine has come to be."""
        import vllm

        cache = self.config.cache_config
        return EngineInfo(
            cache_tokens=(cache.num_gpu_blocks - 1) * cache.block_size,  # one block is never used
            max_positions=self.config.model_config.max_model_len,
            device=self.config.device_config.device_type,
            vllm=vllm.__version__,
        )

    def add(self, request: SequenceRequest) -> list[SequenceOutput]:
        """Add a sequence; return the output of one that can't be added."""
        try:
            vllm_id = self.engine.add_request(
                request.id, {"prompt_token_ids": request.prompt}, self._sampling_params(request),
                lora_request=self._lora_request(request.adapter),
            )  # fmt: skip
        except Exception as error:  # of this request alone
            return [SequenceOutput(request.id, [], "error", [], [], 0, f"{type(error).__name__}: {error}")]
        self.sequences[request.id] = (vllm_id, request)
        return []

    def abort(self, ids: list[str]) -> None:
        """Abort sequences."""
        vllm_ids = [self.sequences.pop(sequence_id)[0] for sequence_id in ids if sequence_id in self.sequences]
        self.engine.abort_request(vllm_ids, internal=True)

    def _sampling_params(self, request: SequenceRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        schema, bias = request.json_schema, request.logit_bias
        return SamplingParams(
            **request.sampling, logit_bias={int(token): value for token, value in bias.items()} if bias else None,
            max_tokens=max(request.max_tokens, 1), seed=request.seed, logprobs=request.num_logprobs,
            prompt_logprobs=(request.num_logprobs or 0) if request.needs_prompt_logprobs else None,
            ignore_eos=True, stop_token_ids=self.eos_ids, detokenize=False, output_kind=RequestOutputKind.DELTA,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
        )  # fmt: skip

    def _lora_request(self, name: str) -> Any:
        if not name:
            return None
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, self.adapter_ids[name], self.adapters[name])
        self.engine.add_lora(request)  # here, where an error is one sequence's
        return request

    def step(self) -> list[SequenceOutput]:
        """Run the engine once; return the outputs."""
        self.num_steps += 1
        outputs = [self._output(output) for output in self.engine.step()]
        self.num_rows += len(outputs)
        return [output for output in outputs if output]

    def _output(self, output: Any) -> SequenceOutput | None:
        vllm_id, request = self.sequences.get(output.request_id, (None, None))
        if vllm_id is None or request is None:
            return None
        completion, prompt = output.outputs[0], request.prompt
        num_top = request.num_logprobs or 0
        tokens, reason = list(completion.token_ids), completion.finish_reason
        logprobs = [format_logprobs(token, entry, num_top) for token, entry in zip(tokens, completion.logprobs or [])]
        if reason == "stop":
            tokens.pop()  # the end token
        entries = enumerate(output.prompt_logprobs or [])
        prompt_logprobs = [format_logprobs(prompt[i], entry, num_top) for i, entry in entries if entry]
        if not request.max_tokens:
            tokens, logprobs, reason = [], [], "length"
        if output.finished:
            del self.sequences[output.request_id]
        return SequenceOutput(
            output.request_id, tokens, reason, logprobs, prompt_logprobs, output.num_cached_tokens or 0
        )


def lora_arguments(lora: LoraSetup | None) -> dict[str, Any]:
    """Return the engine arguments for adapters."""
    if lora is None:
        return {}
    from vllm.config.lora import MaxLoRARanks
    from vllm.platforms import current_platform

    sizes = [size for size in get_args(MaxLoRARanks) if size >= lora.max_rank]
    if not sizes:
        raise SetupRefused(f"an adapter has rank {lora.max_rank}, and vLLM takes {max(get_args(MaxLoRARanks))} at most")
    # On a CPU, vLLM gives rows without an adapter that of the last index, which is therefore left empty.
    max_loras = lora.num_adapters + 1 if current_platform.is_cpu() else lora.max_loaded
    return {
        "enable_lora": True, "max_loras": max_loras, "max_cpu_loras": max_loras, "max_lora_rank": min(sizes),
        "lora_target_modules": lora.modules,
    }  # fmt: skip


def size_cache(config: Any, tokens: int | None) -> None:
    """Bound the KV cache by tokens; None: by all sequences that may run at once, on a CPU, and on a GPU as vLLM does."""
    cache, model = config.cache_config, config.model_config
    if tokens is not None:
        cache.num_gpu_blocks_override = -(-(tokens + 1) // cache.block_size) + 1
    if config.device_config.device_type != "cpu" or cache.kv_cache_memory_bytes is not None:
        return
    import psutil

    parallel = config.parallel_config
    heads, width = model.get_num_kv_heads(parallel), model.get_head_size()
    bytes_per_token = 2 * model.get_num_layers(parallel) * heads * width * model.dtype.itemsize
    num_blocks = config.scheduler_config.max_num_seqs * -(-model.max_model_len // cache.block_size) + 1
    full_bytes = num_blocks * cache.block_size * bytes_per_token
    cache.kv_cache_memory_bytes = min(full_bytes, int(MEMORY_SHARE * psutil.virtual_memory().available))


def format_logprobs(token: int, entry: dict[int, Any], num_top: int) -> Logprobs:
    """Return [token, log-probability, [[token, log-probability] of the `num_top` likeliest]]."""
    top = sorted((value.rank, other, value.logprob) for other, value in entry.items() if value.rank <= num_top)
    return [token, entry[token].logprob, [[other, logprob] for _, other, logprob in top]]


def setup_from(plain: dict[str, Any]) -> EngineSetup:
    """Return a setup from its JSON."""
    return EngineSetup(**plain | {"lora": LoraSetup(**plain["lora"]) if plain["lora"] else None})


def main(fileno: int) -> None:
    """Make an engine by the first message, and run it."""
    link = Link(fileno)
    setup = setup_from(link.received.get()["setup"])
    try:
        worker = Worker(setup)
    except Exception as error:
        link.send({"refused": str(error) if isinstance(error, SetupRefused) else f"{type(error).__name__}: {error}"})
        raise
    link.send({"ready": dataclasses.asdict(worker.info())})
    while True:
        outputs: list[SequenceOutput] = []
        for message in link.receive(wait=not worker.sequences):
            if "add" in message:
                outputs += worker.add(SequenceRequest(**message["add"]))
            else:
                worker.abort(message["abort"])
        if worker.sequences:
            outputs += worker.step()
        if outputs:
            plain = [vars(output) for output in outputs]
            link.send({"outputs": plain, "steps": worker.num_steps, "rows": worker.num_rows})


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""Text generation by vLLM (Kwon et al. 2023, https://arxiv.org/abs/2309.06180), which runs in a process of its own.

vLLM needs other versions of torch and transformers than Manta, so it has an environment of its own, whose Python runs
`vllm_worker`. This end keeps the queue, and hands over as many sequences as may run at once: fairness, deadlines and
refusals are those of `TransformersEngine`. An unnamed socket connects the two processes; each ends with the other.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.bundles.bundle import Bundle
from engine.config import ServeConfig
from engine.errors import UserError
from engine.objectives.contract import Objective
from engine.serve.jobs import MAX_LOGPROBS
from engine.serve.llm.lora import rank_and_modules, read_pinned
from engine.serve.llm.model_runner import max_positions
from engine.serve.llm.sampler import TokenLogprobs
from engine.serve.llm.scheduler import POLL_S, EngineQueue
from engine.serve.llm.sequence import Sequence
from engine.serve.llm.vllm_worker import EngineInfo, EngineSetup, LoraSetup, Message, SequenceOutput, SequenceRequest

WORKER = Path(__file__).with_name("vllm_worker.py")
HAS_VLLM = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
CHECK_TIMEOUT_S = 60.0  # for whether a Python has vLLM
READ_BYTES = 2**16  # read from the socket at once
MAX_REASON_CHARACTERS = 400  # of a message of vLLM's
LOG = logging.getLogger(__name__)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# To llguidance: no whitespace between the words of JSON, where a small model may write it without end. A text that follows
# this also follows `structured_output`'s grammar, whose single blank vLLM's version of llguidance may not support.
NO_WHITESPACE = {"x-guidance": {"whitespace_flexible": False}}
# The engine runs within the worker; no hub is asked, and no usage statistics are sent. For a prompt that fills all
# positions, one token more is requested, which vLLM counts and never reads.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}  # fmt: skip


class VllmEngine:
    """Owns vLLM's process and the thread that communicates with it; an `engine.LLMEngine`."""

    def __init__(
        self,
        folder: Path,
        options: ServeConfig,
        dtype: torch.dtype,
        on_output: Callable[[list[Sequence]], None] = lambda _: None,
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        """Start vLLM on a model's folder and wait until it is ready.

        `on_output` is called from the thread, after each of vLLM's steps, with the sequences that have something new for
        their listeners; `on_exit` when vLLM's process has ended, before its sequences are failed. `options.adapters` are
        as `pin_adapters` returns them. Raises UserError where vLLM is missing, or refuses the model or an option.
        """
        check_vllm_python(options)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        limits = [limit for limit in (max_positions(config), options.kv_cache_tokens) if limit]
        self.max_num_seqs, self.on_exit = options.max_num_seqs, on_exit
        self.adapters, self.max_adapters = options.adapters, options.max_adapters
        # The adapters that vLLM has loaded, the least recently used first.
        self.loaded_adapters: OrderedDict[str, None] = OrderedDict()
        self.num_adapter_loads = self.num_steps = self.num_rows = self.num_cached_tokens = 0
        self.on_output = on_output
        self.queue = EngineQueue(options.max_queue, self._notify)
        self.running: dict[str, Sequence] = {}  # by id, the oldest first
        self._last_id = 0
        self._has_exited = False
        self._socket, worker_socket = socket.socketpair()
        # A byte on this pair wakes the thread, which waits for the sockets.
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._thread: threading.Thread | None = None
        self._process = start_worker(options, worker_socket)
        try:
            self._messages = self._read()
            setup = engine_setup(folder, options, dtype, min(limits, default=None), eos_ids(folder, config))
            self.info = self._set_up(setup)
        except BaseException:
            self.close()
            raise
        self.max_seq_len: int = min([*limits, self.info.max_positions - 1, self.info.cache_tokens])
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none. Raises QueueFull; ValueError for one that is too long."""
        self.queue.add(sequences, self.max_seq_len)
        if self._has_exited:  # the thread has ended, and will not fail them
            self._fail_all()
        self._wake()

    def abort(self, sequences: list[Sequence]) -> None:
        """Drop sequences before vLLM's next step."""
        self.queue.abort(sequences)
        self._wake()

    @property
    def is_alive(self) -> bool:
        """Whether vLLM's process, and its connection, are alive."""
        return not self._has_exited and self._process.poll() is None

    @property
    def stats(self) -> dict[str, int]:
        """Load and totals since the start.

        A sequence counts as a row where it got a token: vLLM doesn't report those whose prompt is in prefill.
        """
        running = list(self.running.values())
        return {
            "waiting": len(self.queue), "running": len(running),
            "cached_tokens": sum(sequence.num_computed_tokens for sequence in running),
            "cache_tokens": self.info.cache_tokens, "steps": self.num_steps, "rows": self.num_rows,
            "reused_tokens": self.num_cached_tokens, "adapters": len(self.loaded_adapters),
            "adapter_loads": self.num_adapter_loads,
        }  # fmt: skip

    def generate(self, sequences: list[Sequence]) -> None:
        """Queue sequences and wait until all are finished. Raises UserError where one fails."""
        listener = AllFinished(sequences)
        for sequence in sequences:
            sequence.listener = listener
        self.submit(sequences)
        listener.event.wait()
        if errors := [sequence.error for sequence in sequences if sequence.finish_reason == "error"]:
            raise UserError(f"serve.generator=vllm: {one_line(errors[0])}")

    def _notify(self, sequences: list[Sequence]) -> None:
        """Notify the listeners of `generate`, and pass the other sequences on."""
        own: list[Sequence] = []
        others: list[Sequence] = []
        for sequence in sequences:
            (own if isinstance(sequence.listener, AllFinished) else others).append(sequence)
        for sequence in own:
            sequence.listener.notify()
        if others:
            self.on_output(others)

    def close(self) -> None:
        """End vLLM's process."""
        self._process.kill()
        self._process.wait()
        if self._thread:
            self._thread.join()  # it ends when the socket is closed at the other end
        for end in (self._socket, self._wake_sender, self._wake_receiver):
            end.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the buffer is full, so that it will wake, or the engine is closed
            self._wake_sender.send(b".", socket.MSG_DONTWAIT)

    def _send(self, messages: Iterable[Message]) -> None:
        lines = (json.dumps(message, separators=(",", ":")).encode() + b"\n" for message in messages)
        self._socket.sendall(b"".join(lines))

    def _read(self) -> Iterator[list[Message]]:
        """Yield the messages that have come, whenever some have or `_wake` is called. Raises EOFError where vLLM has ended."""
        buffer = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(POLL_S if len(self.queue) else None)]
                if self._wake_receiver in ready:
                    self._wake_receiver.recv(READ_BYTES)
                lines: list[bytes] = []
                if self._socket in ready:
                    data = self._socket.recv(READ_BYTES)
                    if not data:
                        raise EOFError
                    *lines, buffer = (buffer + data).split(b"\n")
                yield [json.loads(line) for line in lines]

    def _set_up(self, setup: EngineSetup) -> EngineInfo:
        """Have vLLM make an engine. Raises UserError."""
        with contextlib.suppress(EOFError, OSError):
            self._send([{"setup": asdict(setup)}])
            for messages in self._messages:
                for message in messages:
                    if "ready" in message:
                        return EngineInfo(**message["ready"])
                    raise UserError(f"serve.generator=vllm: {one_line(message['refused'])}")
        raise UserError("serve.generator=vllm: vLLM ended before it was ready: look at Ray's logs in the run's folder")

    def _run(self) -> None:
        try:
            for messages in self._messages:
                for message in messages:
                    self._process_outputs(message)
                self._send(self._schedule())
                self.queue.flush_outputs()
        except (EOFError, OSError):
            LOG.error("vLLM has ended")
        finally:
            with self.queue.changed:
                self._has_exited = True
            self.on_exit()
            self._fail_all()

    def _fail_all(self) -> None:
        with self.queue.changed:
            for sequence_id in list(self.running):
                self._finish(sequence_id, "error", "vLLM has ended")
            self.queue.fail_waiting("vLLM has ended")
        self.queue.flush_outputs()

    def _schedule(self) -> list[Message]:
        """Return what vLLM has to abort, and what it has to add."""
        with self.queue.changed:
            return [*self._drop_aborted(), *self._admit()]

    def _drop_aborted(self) -> list[Message]:
        """Drop aborted sequences, and those that did not start by their deadline."""
        if not self.queue.drop_waiting():
            return []
        aborted = [sequence_id for sequence_id, sequence in self.running.items() if sequence.aborted]
        for sequence_id in aborted:
            self._finish(sequence_id, "abort")
        return [{"abort": aborted}] if aborted else []

    def _admit(self) -> list[Message]:
        """Start waiting sequences until one has to wait: for others to finish, or for room for its adapter."""
        messages: list[Message] = []
        while len(self.running) < self.max_num_seqs and (sequence := self.queue.first()):
            running = {other.adapter for other in self.running.values() if other.adapter}
            if len(running | {sequence.adapter} - {""}) > self.max_adapters:
                break
            self.queue.start(sequence)
            self._last_id += 1
            sequence_id = str(self._last_id)
            self.running[sequence_id] = sequence
            try:
                self._use_adapter(sequence.adapter)
            except UserError as error:
                self._finish(sequence_id, "error", str(error))
                continue
            messages.append({"add": vars(sequence_request(sequence_id, sequence))})
        return messages

    def _use_adapter(self, name: str) -> None:
        """Note that an adapter is used. Raises UserError for one that was changed since it was deployed."""
        if not name:
            return
        if name not in self.loaded_adapters:
            read_pinned(name, self.adapters[name])
            self.num_adapter_loads += 1
        self.loaded_adapters[name] = None
        self.loaded_adapters.move_to_end(name)
        while len(self.loaded_adapters) > self.max_adapters:
            self.loaded_adapters.popitem(last=False)

    def _process_outputs(self, message: Message) -> None:
        """Append what a step of vLLM has brought to its sequences."""
        self.num_steps, self.num_rows = message["steps"], message["rows"]
        complete = []
        with self.queue.changed:
            for output in (SequenceOutput(**plain) for plain in message["outputs"]):
                sequence = self.running.get(output.id)
                if sequence is None:  # it was aborted
                    continue
                if not sequence.num_computed_tokens:
                    sequence.num_cached_tokens = output.num_cached_tokens
                    self.num_cached_tokens += output.num_cached_tokens
                end = append_output(sequence, output)
                sequence.num_computed_tokens = sequence.num_tokens
                reason = output.finish_reason
                if end:
                    complete += [output.id] if reason is None else []
                    self._finish(output.id, *end)
                elif reason:
                    is_regular = reason in ("stop", "length")
                    self._finish(output.id, reason if is_regular else "error", output.error or f"vLLM: {reason}")
                elif sequence.streams and output.tokens:
                    self.queue.report(sequence)
        if complete:
            self._send([{"abort": complete}])

    def _finish(self, sequence_id: str, reason: str, error: str = "") -> None:
        self.queue.finish(self.running.pop(sequence_id), reason, error if reason == "error" else "")


class AllFinished:
    """A listener that waits until all its sequences are finished."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences, self.event = sequences, threading.Event()

    def notify(self) -> None:
        """Set the event if all are finished."""
        if all(sequence.finish_reason for sequence in self.sequences):
            self.event.set()


def append_output(sequence: Sequence, output: SequenceOutput) -> tuple[str, str] | None:
    """Append log-probabilities and then tokens, since a listener reads up to len(tokens) of both.

    Returns (finish reason, error) where they end the sequence.
    """
    logprobs = [parse_logprobs(plain) for plain in output.logprobs]
    prompt_logprobs = [parse_logprobs(plain) for plain in output.prompt_logprobs]
    if any(math.isnan(entry.logprob) for entry in (*logprobs, *prompt_logprobs)):
        return "error", "the model's output is not a finite number"
    sequence.prompt_logprobs += prompt_logprobs
    sequence.token_logprobs += logprobs
    sequence.first_token_at = sequence.first_token_at or time.monotonic()
    for token in output.tokens:
        is_complete = sequence.mask is not None and sequence.mask.accept_token(token)
        sequence.tokens.append(token)
        if is_complete:
            return "stop", ""
    return None


def start_worker(options: ServeConfig, worker_socket: socket.socket) -> subprocess.Popen[bytes]:
    """Start the worker with its end of the socket; its output goes to this process's standard error."""
    environment = dict(os.environ) | ENVIRONMENT
    if not options.gpus_per_replica:
        environment["OMP_NUM_THREADS"] = str(max(1, round(options.cpus_per_replica)))
    with worker_socket:
        fileno = worker_socket.fileno()
        return subprocess.Popen(
            [vllm_python(options), "-I", str(WORKER), str(fileno)],  # -I: none of our modules shadows one of its own
            env=environment, pass_fds=[fileno], stdin=subprocess.DEVNULL, stdout=sys.__stderr__, stderr=sys.__stderr__,
        )  # fmt: skip


def engine_setup(
    folder: Path, options: ServeConfig, dtype: torch.dtype, max_seq_len: int | None, end_tokens: list[int]
) -> EngineSetup:
    """Return the engine for a folder's model: sequences of up to `max_seq_len` tokens, which `end_tokens` end."""
    arguments = {
        "model": str(folder), "dtype": DTYPES[dtype], "max_num_seqs": options.max_num_seqs, "max_logprobs": MAX_LOGPROBS,
        "seed": secrets.randbits(31), "structured_outputs_config": {"backend": "guidance"}, "disable_log_stats": True,
        "tensor_parallel_size": max(1, int(options.gpus_per_replica)),
    }  # fmt: skip
    if max_seq_len:
        arguments["max_model_len"] = max_seq_len + 1
    if options.max_batched_tokens:
        arguments["max_num_batched_tokens"] = options.max_batched_tokens
    return EngineSetup(
        arguments=arguments | options.vllm_options,
        eos_ids=end_tokens,
        kv_cache_tokens=options.kv_cache_tokens,
        adapters={name: pin["folder"] for name, pin in options.adapters.items()},
        lora=lora_setup(options) if options.adapters else None,
    )


def lora_setup(options: ServeConfig) -> LoraSetup:
    """Return what the engine needs room for, with the adapted modules only: vLLM's CPU kernel fails for that of the logits."""
    adapters = [rank_and_modules(name, pin) for name, pin in options.adapters.items()]
    return LoraSetup(
        max_rank=max(rank for rank, _ in adapters),
        modules=sorted(set().union(*(modules for _, modules in adapters))),
        max_loaded=min(options.max_adapters, len(options.adapters)),
        num_adapters=len(options.adapters),
    )


def sequence_request(sequence_id: str, sequence: Sequence) -> SequenceRequest:
    """Return a sequence as the worker takes it."""
    sampling = asdict(sequence.sampling)
    logit_bias = sampling.pop("logit_bias")
    return SequenceRequest(
        id=sequence_id,
        prompt=sequence.prompt,
        max_tokens=sequence.max_tokens,
        seed=sequence.seed,
        sampling=sampling,
        logit_bias={str(token): value for token, value in logit_bias.items()},
        num_logprobs=sequence.num_logprobs,
        needs_prompt_logprobs=sequence.needs_prompt_logprobs,
        adapter=sequence.adapter,
        json_schema=json.loads(sequence.json_schema) | NO_WHITESPACE if sequence.json_schema else None,
    )


def parse_logprobs(plain: list[Any]) -> TokenLogprobs:
    """Return log-probabilities from the worker's form."""
    token, logprob, top = plain
    return TokenLogprobs(token, logprob, [(other, value) for other, value in top])


def eos_ids(folder: Path, config: Any) -> list[int]:
    """Return the end tokens, of the folder's generation config, else of its model's."""
    ids = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        ids = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    return [token for token in (ids if isinstance(ids, list) else [ids]) if token is not None]


def predict(engine: VllmEngine, objective: Objective, requests: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answer golden requests as causal_lm's `predict`: generate after {"prompt"}, or score {"prompt", "continuation"}."""
    requests = list(requests)

    def token_ids(prompt: str | list[int]) -> list[int]:
        ids: list[int] = objective.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return ids or [objective.tokenizer.eos_token_id]

    sequences = [
        Sequence(token_ids(request["prompt"] + request["continuation"]), 0, num_logprobs=0, needs_prompt_logprobs=True)
        if "continuation" in request
        else Sequence(token_ids(request["prompt"]), request.get("max_tokens", 16))
        for request in requests
    ]
    for sequence in sequences:  # one at a time, so that no batch changes an output
        engine.generate([sequence])
    return [
        {"logprobs": [entry.logprob for entry in sequence.prompt_logprobs[len(request["prompt"]) - 1 :]]}
        if "continuation" in request
        else {
            "text": objective.tokenizer.decode(sequence.tokens, skip_special_tokens=True),
            "tokens": sequence.tokens,
        }
        for request, sequence in zip(requests, sequences, strict=True)
    ]


def verified_engine(
    bundle: Bundle,
    options: ServeConfig,
    dtype: torch.dtype,
    on_output: Callable[[list[Sequence]], None],
    on_exit: Callable[[], None],
) -> VllmEngine:
    """Return a bundle's engine. Raises UserError if it was changed, or its outputs differ from the recorded ones."""
    bundle.verify()
    engine = VllmEngine(bundle.folder, options, dtype, on_output, on_exit)
    try:
        bundle.replay_with(lambda requests: predict(engine, bundle.objective(), requests), dtype)
    except BaseException:
        engine.on_exit = lambda: None  # it is closed here
        engine.close()
        raise
    return engine


def vllm_python(options: ServeConfig) -> str:
    """Return the Python that runs vLLM."""
    return options.vllm_python or sys.executable


def check_vllm_python(options: ServeConfig) -> None:
    """Raise UserError where the Python for vLLM can't be run, or has no vLLM."""
    python = vllm_python(options)
    try:
        check = subprocess.run([python, "-I", "-c", HAS_VLLM], capture_output=True, timeout=CHECK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"serve.vllm_python={python} can't be run ({error}): give the path of a Python") from error
    if check.returncode:
        raise UserError(
            f"serve.generator=vllm needs vLLM, and {python} has none: make an environment of its own for it, and name its Python "
            "with serve.vllm_python=..."
        )


def one_line(text: str) -> str:
    """Return a message in one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON_CHARACTERS else line[:MAX_REASON_CHARACTERS] + " ..."

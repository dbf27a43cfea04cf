"""Completions by vLLM (Kwon et al. 2023, https://arxiv.org/abs/2309.06180), which runs in a process of its own.

vLLM asks for other versions of torch and transformers than ours, so it has an environment of its own, whose Python runs
`vllm_worker`. This end keeps the queue, and hands over as many completions as may run together: turns, deadlines and
refusals are those of `generation`. A socket without a name joins the two; each ends with the other.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.bundles.bundle import Bundle
from engine.config import ServeConfig
from engine.errors import UserError
from engine.objectives.contract import Objective
from engine.serve.http.schemas import MOST_LOGPROBS
from engine.serve.llm.engine import LOOK_EVERY_S, Completion, Queued, Score
from engine.serve.llm.lora import extent, unchanged
from engine.serve.llm.model_runner import positions

WORKER = Path(__file__).with_name("vllm_worker.py")
HAS_VLLM = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
ASK_S = 60.0  # for whether a Python has vLLM
PIECE = 2**16  # bytes read from the socket at once
LONGEST_REASON = 400  # characters of what vLLM says
LOG = logging.getLogger(__name__)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# To llguidance: no blanks between the words of JSON, where a small model may else write them without end. What follows the
# schema so follows `structure`'s grammar too, whose one blank vLLM's version of llguidance may not know.
TIGHT = {"x-guidance": {"whitespace_flexible": False}}
# The engine runs within the worker; nothing is asked of a hub, and no usage statistics leave. What is asked of a prompt
# that fills all positions is one token more, which vLLM counts and never reads.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}  # fmt: skip


class VllmEngine(Queued):
    """Owns vLLM's process and the thread that talks with it; a `generation.Generator`."""

    def __init__(
        self,
        folder: Path,
        options: ServeConfig,
        dtype: torch.dtype,
        tell: Callable[[list[Completion]], None] = lambda _: None,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Start vLLM on a model's folder and wait until it is ready.

        `tell` is called from the thread, after each of vLLM's steps, with the completions that have something new for
        their readers; `lost` where vLLM's process has ended, before they are told. `options.adapters` are as `pinned`
        returns them. Raises UserError where vLLM isn't there, or refuses the model or an option.
        """
        refuse_without_vllm(options)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        room = [it for it in (positions(config), options.kv_cache_tokens) if it]
        super().__init__(options.max_queue, tell)
        self.max_num_seqs, self.lost = options.max_num_seqs, lost
        self.known_adapters, self.most_adapters = options.adapters, options.max_adapters
        self.loaded: OrderedDict[str, None] = (
            OrderedDict()
        )  # adapters, as vLLM keeps them: the one longest out of use first
        self.adapter_loads = self.steps = self.rows = self.reused_tokens = 0
        self.running: dict[str, Completion] = {}  # the eldest first
        self._work = threading.Lock()
        self._numbers = 0
        self._ended = False
        self._link, theirs = socket.socketpair()
        self._bell, self._rung = socket.socketpair()
        self._rung.setblocking(False)
        self._thread: threading.Thread | None = None
        self._process = start(options, theirs)
        try:
            self._lines = self._read()
            self.about = self._make(asked_of(folder, options, dtype, min(room, default=None), eos_ids(folder, config)))
        except BaseException:
            self.close()
            raise
        self.limit: int = min([*room, self.about["positions"] - 1, self.about["cache_tokens"]])
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def submit(self, completions: Sequence[Completion]) -> None:
        """Queue completions, all or none. Raises QueueFull; ValueError for one that is over the limit."""
        with self._work:
            self._queue(completions)
            ended = self._ended
        if ended:  # nobody else will tell them
            self._fail_all()
        self._ring()

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Let completions go at vLLM's next step."""
        with self._work:
            self._mark(completions)
        self._ring()

    @property
    def alive(self) -> bool:
        """Whether vLLM's process still runs, and is heard."""
        return not self._ended and self._process.poll() is None

    @property
    def load(self) -> dict[str, int]:
        """Completions waiting and running, tokens in the cache and room for them; sums since the start.

        A sequence counts as a row where it got a token: vLLM doesn't tell those whose prompt it reads in parts.
        """
        running = list(self.running.values())
        found = {
            "waiting": len(self._waiting), "running": len(running), "cached_tokens": sum(it.cached for it in running),
            "cache_tokens": self.about["cache_tokens"], "steps": self.steps, "rows": self.rows,
            "reused_tokens": self.reused_tokens,
        }  # fmt: skip
        return found | {"adapters": len(self.loaded), "adapter_loads": self.adapter_loads}

    def complete(self, completions: Sequence[Completion]) -> None:
        """Queue completions and wait until all have ended. Raises UserError where one fails."""
        ended = Ended(completions)
        for completion in completions:
            completion.reader = ended
        self.submit(completions)
        ended.over.wait()
        if failed := [it.error for it in completions if it.reason == "error"]:
            raise UserError(f"serve.generator=vllm: {in_a_line(failed[0])}")

    def close(self) -> None:
        """End vLLM's process."""
        self._process.kill()
        self._process.wait()
        if self._thread:
            self._thread.join()  # by the end of its socket
        for end in (self._link, self._bell, self._rung):
            end.close()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it rings already, or nobody is there to hear it
            self._bell.send(b".", socket.MSG_DONTWAIT)

    def _send(self, lines: Sequence[dict[str, Any]]) -> None:
        self._link.sendall(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines))

    def _read(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the lines that have come, each time that it rings or some have. Raises EOFError where vLLM has ended."""
        begun = b""
        with selectors.DefaultSelector() as ears:
            ears.register(self._link, selectors.EVENT_READ)
            ears.register(self._rung, selectors.EVENT_READ)
            while True:
                heard = [key.fileobj for key, _ in ears.select(LOOK_EVERY_S if len(self._waiting) else None)]
                if self._rung in heard:
                    self._rung.recv(PIECE)
                whole: list[bytes] = []
                if self._link in heard:
                    piece = self._link.recv(PIECE)
                    if not piece:
                        raise EOFError
                    *whole, begun = (begun + piece).split(b"\n")
                yield [json.loads(line) for line in whole]

    def _make(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Have vLLM make an engine; return what it has come to be. Raises UserError."""
        with contextlib.suppress(EOFError, OSError):
            self._send([asked])
            for lines in self._lines:
                for line in lines:
                    if "ready" in line:
                        return dict(line["ready"])
                    raise UserError(f"serve.generator=vllm: {in_a_line(line['refused'])}")
        raise UserError("serve.generator=vllm: vLLM ended before it was ready: look at Ray's logs in the run's folder")

    def _run(self) -> None:
        try:
            for lines in self._lines:
                for line in lines:
                    self._take(line)
                self._send(self._hand_over())
                self._tell_news()
        except (EOFError, OSError):
            LOG.error("vLLM has ended")
        finally:
            with self._work:
                self._ended = True
            self.lost()
            self._fail_all()

    def _fail_all(self) -> None:
        with self._work:
            for number in list(self.running):
                self._end(number, "error", "vLLM has ended")
            for completion in self._waiting.remove(lambda _: True):
                completion.error, completion.reason = "vLLM has ended", "error"
                self._news.append(completion)
            news, self._news = self._news, []
        if news:
            self.tell(news)

    def _hand_over(self) -> list[dict[str, Any]]:
        """Return what vLLM has to know: whom to let go, and who comes."""
        with self._work:
            return [*self._let_go(), *self._admit()]

    def _let_go(self) -> list[dict[str, Any]]:
        """Take off who left, and whose deadline is over before a place was free."""
        if not self._look():
            return []
        gone = [number for number, it in self.running.items() if it.cancelled]
        for number in gone:
            self._end(number, "cancelled")
        return [{"drop": gone}] if gone else []

    def _admit(self) -> list[dict[str, Any]]:
        """Give places to those whose turn it is, until one has to wait: for a place, or for its adapter."""
        lines = []
        while len(self.running) < self.max_num_seqs and (turn := self._waiting.first()):
            client, completion = turn
            in_use = {it.adapter for it in self.running.values() if it.adapter} | {completion.adapter} - {""}
            if len(in_use) > self.most_adapters:
                break
            self._waiting.start(client, completion.need)
            completion.placed_at = time.monotonic()
            self._numbers += 1
            number = str(self._numbers)
            self.running[number] = completion
            try:
                self._load(completion.adapter)
            except UserError as error:
                self._end(number, "error", str(error))
                continue
            lines.append(asked_for(number, completion))
        return lines

    def _load(self, name: str) -> None:
        """Note that an adapter is used. Raises UserError for one that was changed since it was deployed."""
        if not name:
            return
        if name not in self.loaded:
            unchanged(name, self.known_adapters[name])
            self.adapter_loads += 1
        self.loaded[name] = None
        self.loaded.move_to_end(name)
        while len(self.loaded) > self.most_adapters:
            self.loaded.popitem(last=False)

    def _take(self, line: dict[str, Any]) -> None:
        """Give completions what vLLM's step has brought them."""
        self.steps, self.rows = line["steps"], line["rows"]
        dropped = []
        with self._work:
            for number, tokens, reason, scores, of_prompt, reused, error in line["news"]:
                completion = self.running.get(number)
                if completion is None:  # it has left
                    continue
                if not completion.cached:
                    completion.reused = reused
                    self.reused_tokens += reused
                ends = write(completion, tokens, [score_of(it) for it in scores], [score_of(it) for it in of_prompt])
                completion.cached = completion.known
                if ends:
                    dropped += [number] if reason is None else []
                    self._end(number, *ends)
                elif reason:
                    self._end(number, reason if reason in ("stop", "length") else "error", error or f"vLLM: {reason}")
                elif completion.stepwise and tokens:
                    self._news.append(completion)
        if dropped:
            self._send([{"drop": dropped}])

    def _end(self, number: str, reason: str, error: str = "") -> None:
        """Free a place."""
        completion = self.running.pop(number)
        self._waiting.end(completion.client, completion.need - completion.known)
        completion.ended_at = time.monotonic()
        completion.error, completion.reason = error if reason == "error" else "", reason
        self._news.append(completion)


class Ended:
    """A reader that waits for the end of all its completions."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self.completions, self.over = completions, threading.Event()

    def wake(self) -> None:
        """Look whether all have ended."""
        if all(it.reason for it in self.completions):
            self.over.set()


def write(completion: Completion, tokens: Sequence[int], scores: Sequence[Score], of_prompt: Sequence[Score]) -> tuple[str, str] | None:  # fmt: skip
    """Append tokens, after their scores, of which a reader takes as many; return (reason, error) where they end it."""
    if any(math.isnan(score.logprob) for score in (*scores, *of_prompt)):
        return "error", "the model's output is not a finite number"
    completion.prompt_scores += of_prompt
    completion.scores += scores
    completion.first_at = completion.first_at or time.monotonic()
    for token in tokens:
        whole = completion.mask is not None and completion.mask.take(token)
        completion.tokens.append(token)
        if whole:
            return "stop", ""
    return None


def start(options: ServeConfig, theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Start the worker on its end of the socket; what it says goes where this process's own errors go."""
    environment = dict(os.environ) | ENVIRONMENT
    if not options.gpus_per_replica:
        environment["OMP_NUM_THREADS"] = str(max(1, round(options.cpus_per_replica)))
    with theirs:
        number = theirs.fileno()
        return subprocess.Popen(
            [python_of(options), "-I", str(WORKER), str(number)],  # -I: none of our modules is taken for one of its own
            env=environment, pass_fds=[number], stdin=subprocess.DEVNULL, stdout=sys.__stderr__, stderr=sys.__stderr__,
        )  # fmt: skip


def asked_of(folder: Path, options: ServeConfig, dtype: torch.dtype, most: int | None, ends: list[int]) -> dict[str, Any]:  # fmt: skip
    """Return what the engine is to be, as the worker reads it; sequences of `most` tokens, which `ends` end."""
    arguments = {
        "model": str(folder), "dtype": DTYPES[dtype], "max_num_seqs": options.max_num_seqs, "max_logprobs": MOST_LOGPROBS,
        "seed": secrets.randbits(31), "structured_outputs_config": {"backend": "guidance"}, "disable_log_stats": True,
        "tensor_parallel_size": max(1, int(options.gpus_per_replica)),
    }  # fmt: skip
    if most:
        arguments["max_model_len"] = most + 1
    if options.max_batched_tokens:
        arguments["max_num_batched_tokens"] = options.max_batched_tokens
    return {
        "arguments": arguments | options.vllm_options, "eos_ids": ends, "cache_tokens": options.kv_cache_tokens,
        "adapters": {name: it["folder"] for name, it in options.adapters.items()},
        "lora": lora_of(options) if options.adapters else None,
    }  # fmt: skip


def lora_of(options: ServeConfig) -> dict[str, Any]:
    """Return what the engine has to have room for. No other layer is touched: vLLM's CPU kernel fails in that of logits."""
    extents = [extent(name, it) for name, it in options.adapters.items()]
    return {
        "rank": max(rank for rank, _ in extents), "layers": sorted(set().union(*(layers for _, layers in extents))),
        "most": min(options.max_adapters, len(options.adapters)), "all": len(options.adapters),
    }  # fmt: skip


def asked_for(number: str, completion: Completion) -> dict[str, Any]:
    """Return a completion as the worker reads it."""
    sampling = asdict(completion.sampling)
    bias = sampling.pop("bias")
    return {
        "number": number, "prompt": completion.prompt, "max_tokens": completion.max_tokens, "seed": completion.seed,
        "sampling": sampling, "bias": {str(token): value for token, value in bias.items()},
        "logprobs": completion.logprobs, "score_prompt": completion.score_prompt, "adapter": completion.adapter,
        "schema": json.loads(completion.schema) | TIGHT if completion.schema else None,
    }  # fmt: skip


def score_of(told: Sequence[Any]) -> Score:
    """Return a score as the worker tells it."""
    token, logprob, top = told
    return Score(token, logprob, [(other, value) for other, value in top])


def eos_ids(folder: Path, config: Any) -> list[int]:
    """Return the tokens that end a text, of the folder's generation config, else of its model's."""
    found = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        found = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    return [it for it in (found if isinstance(found, list) else [found]) if it is not None]


def golden_answers(generator: VllmEngine, objective: Objective, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:  # fmt: skip
    """Answer golden requests as causal_lm's `predict` does: continue {"prompt"}, or judge {"prompt", "continuation"}."""

    def ids(prompt: str | list[int]) -> list[int]:
        found: list[int] = objective.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return found or [objective.tokenizer.eos_token_id]

    completions = [
        Completion(ids(it["prompt"] + it["continuation"]), 0, logprobs=0, score_prompt=True)
        if "continuation" in it
        else Completion(ids(it["prompt"]), it.get("max_tokens", 16))
        for it in requests
    ]
    for completion in completions:  # each alone, so that company cannot change an answer
        generator.complete([completion])
    return [
        {"logprobs": [score.logprob for score in it.prompt_scores[len(request["prompt"]) - 1 :]]}
        if "continuation" in request
        else {"text": objective.tokenizer.decode(it.tokens, skip_special_tokens=True), "tokens": it.tokens}
        for request, it in zip(requests, completions, strict=True)
    ]


def verified_generator(
    bundle: Bundle,
    options: ServeConfig,
    dtype: torch.dtype,
    tell: Callable[[list[Completion]], None],
    lost: Callable[[], None],
) -> VllmEngine:
    """Return a bundle's generator. Raises UserError if it was changed or answers otherwise than recorded."""
    bundle.verify()
    generator = VllmEngine(bundle.folder, options, dtype, tell, lost)
    try:
        bundle.replay_by(lambda requests: golden_answers(generator, bundle.objective(), requests), dtype)
    except BaseException:
        generator.lost = lambda: None  # it is ended from here
        generator.close()
        raise
    return generator


def python_of(options: ServeConfig) -> str:
    """Return the Python that is to run vLLM."""
    return options.vllm_python or sys.executable


def refuse_without_vllm(options: ServeConfig) -> None:
    """Raise UserError where the Python that is to run vLLM can't be run, or has none."""
    python = python_of(options)
    try:
        found = subprocess.run([python, "-I", "-c", HAS_VLLM], capture_output=True, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"serve.vllm_python={python} can't be run ({error}): give the path of a Python") from error
    if found.returncode:
        raise UserError(
            f"serve.generator=vllm needs vLLM, and {python} has none: make an environment of its own for it, and name its Python "
            "with serve.vllm_python=..."
        )


def in_a_line(told: str) -> str:
    """Return what vLLM says in one line, not too long."""
    line = " ".join(told.split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " ..."

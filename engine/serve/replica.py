"""One replica: a bundle that is verified, replayed and then answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.nn.functional as F
from ray import serve
from ray.serve.exceptions import RayServeException
from torch import nn
from transformers import AutoConfig

from engine.bundles.bundle import Bundle
from engine.config import ServeConfig
from engine.errors import UserError
from engine.models.int8 import quantize
from engine.objectives.contract import pad_rows
from engine.serve.batching import DynamicBatcher
from engine.serve.llm.chat_template import TemplateError, chat_prompt
from engine.serve.llm.cpu.linear import pack_linear
from engine.serve.llm.detokenizer import Detokenizer, Logprobs
from engine.serve.llm.engine import Completion, LLMEngine, QueueFull, TransformersEngine
from engine.serve.llm.lora import LoraAdapters
from engine.serve.llm.model_runner import positions
from engine.serve.llm.sampler import Mask, SamplingParams
from engine.serve.llm.structured_output import BadSchema, Structure
from engine.serve.llm.vllm_engine import verified_generator
from engine.serve.routing.autoscaling import IPC_REQUESTS, TOKENS_IN_FLIGHT
from engine.serve.routing.ipc import IpcAddress, IpcServer
from engine.serve.routing.loopback import bind_to_loopback
from engine.serve.short_lived_thread import run_in_short_lived_thread
from engine.serve.tracing import Trace, Tracing

TASKS = {
    "AutoModelForCausalLM": "completion",
    "AutoModelForSequenceClassification": "classification",
    "AutoModelForSpeechSeq2Seq": "transcription",
    "diffusers.DiTTransformer2DModel": "images",
}
EMBEDS = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
)  # whose models read a text and have one last hidden state a token
PRECISIONS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
CHARACTERS_A_TOKEN = 4  # about, of English: https://help.openai.com/en/articles/4936856
LONG_TEXT = 20_000  # characters that are tokenized off the event loop
VERSION_DIGITS = 12  # of a bundle's hash
STEP_TOKENS = 256  # in a forward of our own generator, where nobody says


class Refused(Exception):
    """A job that this replica doesn't take, as told to the client."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.told = {"error": message, "param": param, "status": status}


class Reader:
    """Wakes the coroutine that reads a job's completions, from the generator's thread."""

    def __init__(self) -> None:
        self.loop, self.news = asyncio.get_running_loop(), asyncio.Event()


def wake_readers(news: Sequence[Completion]) -> None:
    """Let the readers of these look, all of a loop in one turn of it."""
    readers = defaultdict(set)
    for completion in news:
        readers[completion.reader.loop].add(completion.reader)
    for loop, its_own in readers.items():
        with contextlib.suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(_wake, its_own)


def _wake(readers: set[Reader]) -> None:
    for reader in readers:
        reader.news.set()


@dataclass
class Followed:
    """A completion, and what its reader was told of it."""

    completion: Completion
    text: Detokenizer
    logprobs: Logprobs
    seen: int = 0  # tokens
    ended: bool = False


class Replica:
    """Serves one bundle; deployed by `deploy`."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        """Load the bundle. Raises UserError, and so takes no traffic, if it was changed or answers otherwise than recorded."""
        bind_to_loopback()
        self.options = ServeConfig(**options)
        self.ipc_server = IpcServer(self)
        torch.set_num_threads(max(1, round(self.options.cpus_per_replica)))
        self.bundle = Bundle.open(Path(folder))
        about = {"service.instance.id": replica_id(), "manta.version": self.bundle.hash[:VERSION_DIGITS]}
        self.tracing = Tracing(self.options.tracing, about)
        self.objective = self.bundle.objective()
        self.writing: set[Completion] = set()
        self.reading = 0  # tokens of the other tasks' inputs, about
        self.forwards = self.rows = 0  # of inputs that are no completions
        self.structure: Structure | None = None  # made when it is first asked for
        self.generator: LLMEngine | None = None
        if self.options.generator == "vllm":
            self.config = AutoConfig.from_pretrained(self.bundle.folder, local_files_only=True)
            vllm = verified_generator(
                self.bundle, self.options, dtype_for(self.bundle, self.options), wake_readers, leave
            )
            self.generator, self.device = vllm, vllm.about["device"]
        else:
            self.model = run_in_short_lived_thread(lambda: loaded(self.bundle, self.options))
            self.config, self.device = self.model.config, str(self.model.device)
        self.positions = positions(self.config) or self.objective.sequence_length
        if self.objective.auto_class == "AutoModelForCausalLM" and self.generator is None:
            draft = Bundle.open(self.options.draft_model) if self.options.draft_model else None
            self.generator = TransformersEngine(
                self.model, self.positions, max_num_seqs=self.options.max_num_seqs, max_queue=self.options.max_queue,
                max_batched_tokens=self.options.max_batched_tokens or STEP_TOKENS, cache_tokens=self.options.kv_cache_tokens,
                num_speculative_tokens=self.options.num_speculative_tokens,
                draft=run_in_short_lived_thread(lambda: loaded(draft, self.options)) if draft else None,
                compiled=self.options.compile, tell=wake_readers,
                adapters=LoraAdapters(self.model, self.options.adapters, self.options.max_adapters),
            )  # fmt: skip
        together = partial(DynamicBatcher, most=self.options.max_num_seqs, wait_s=self.options.batch_wait_s, thread=ThreadPoolExecutor(1))  # fmt: skip
        self.classified, self.embedded = together(self._classify), together(self._embed)
        self.drawn = together(self._draw)
        self.transcribed = together(self._transcribe)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the tokens that are still to be read and written, of all that is queued and runs here, and requests by lanes."""
        left = sum(it.need - it.cached for it in list(self.writing) if it.reason is None)
        return {TOKENS_IN_FLIGHT: float(left + self.reading), IPC_REQUESTS: float(self.ipc_server.num_in_flight)}

    async def ipc_address(self) -> IpcAddress:
        """Return where an ingress on this node connects to this replica; the first call starts to listen."""
        await self.ipc_server.start()
        return IpcAddress(ray.get_runtime_context().get_node_id(), self.ipc_server.socket_name)

    def __del__(self) -> Awaitable[None] | None:
        """Finish the calls that came by sockets before the process ends: Serve awaits this."""
        return self.ipc_server.close(self.options.drain_s) if self.ipc_server.is_listening else None

    @contextlib.contextmanager
    def reads(self, inputs: Sequence[str | list[int]]) -> Iterator[None]:
        """Count some inputs as in flight while they are answered."""
        with self.busy(sum(len(it) // (CHARACTERS_A_TOKEN if isinstance(it, str) else 1) + 1 for it in inputs)):
            yield

    @contextlib.contextmanager
    def busy(self, tokens: int) -> Iterator[None]:
        """Count some tokens as in flight during a block."""
        self.reading += tokens
        try:
            yield
        finally:
            self.reading -= tokens

    def check_health(self) -> None:
        """Raise if no completion would end any more; Serve then replaces this replica."""
        if self.generator and not self.generator.alive:
            raise RuntimeError("the generator has ended")

    def describe(self) -> dict[str, Any]:
        """Return what the ingress needs to know to check requests."""
        config: Any = self.config
        return {
            "task": TASKS.get(self.objective.auto_class, self.objective.options.name),
            "positions": self.generator.limit if self.generator else self.positions,
            "vocabulary": getattr(config, "vocab_size", 0),
            "embeds": self.objective.auto_class in EMBEDS and self.options.generator == "transformers",
            "heard": getattr(config, "max_source_positions", 0),  # positions of a window of sound
            "hash": self.bundle.hash,
            "adapters": {name: it["hash"] for name, it in self.options.adapters.items()},
            "image": self.objective.image_facts(self.config),
        }

    def figures(self) -> dict[str, Any]:
        """Return what /metrics tells of this replica."""
        load = self.generator.load if self.generator else {}
        return load | {
            "replica": replica_id(), "version": self.bundle.hash[:VERSION_DIGITS], "device": self.device,
            "steps": self.forwards + load.get("steps", 0), "rows": self.rows + load.get("rows", 0),
            "by_lanes": self.ipc_server.num_requests,
        }  # fmt: skip

    async def classify(self, texts: list[str], trace: Trace | None = None) -> list[dict[str, Any]]:
        """Classify a request's texts, in batches with those of other requests that come at about the same time."""
        with self.tracing.work("classify", trace), self.reads(texts):
            return await self.classified(texts)

    def _classify(self, texts: list[str]) -> list[dict[str, Any]]:
        self.forwards, self.rows = self.forwards + 1, self.rows + len(texts)
        answers = self.objective.predict(self.model, [{"text": text} for text in texts])
        lengths = [len(ids) for ids in self.objective.tokenizer(texts)["input_ids"]]
        return [answer | {"tokens": length} for answer, length in zip(answers, lengths, strict=True)]

    async def embed(self, inputs: list[str | list[int]], trace: Trace | None = None) -> list[dict[str, Any]]:
        """Return {"embedding", "tokens"} of each input, or one {"error"}: the mean of the last hidden states, of length 1."""
        ids = [await self._ids(text) for text in inputs]
        longest = max(map(len, ids))
        if longest > self.positions:
            told = f"an input has {longest:,} tokens, over the model's {self.positions:,} positions: use less"
            return [Refused(told, "input").told]
        with self.tracing.work("embed", trace), self.reads(ids):
            vectors = await self.embedded(ids)
        return [{"embedding": vector, "tokens": len(row)} for vector, row in zip(vectors, ids, strict=True)]

    @torch.inference_mode()
    def _embed(self, rows: list[list[int]]) -> list[list[float]]:
        self.forwards, self.rows = self.forwards + 1, self.rows + len(rows)
        ids_BL, mask_BL = (it.to(self.model.device) for it in pad_rows(rows, self.objective.tokenizer.pad_token_id))  # type: ignore[arg-type]
        hidden_BLD = self.model.base_model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()  # type: ignore[operator]
        mean_BD = (hidden_BLD * mask_BL[:, :, None]).sum(1) / mask_BL.sum(1, keepdim=True)
        found: list[list[float]] = F.normalize(mean_BD, dim=1).tolist()
        return found

    async def draw(self, prompt: str, seeds: list[int], trace: Trace | None = None) -> list[dict[str, Any]]:
        """Make an image of a prompt from each seed, {"image": a PNG file in base64}, or return one {"error"}."""
        requests = [{"prompt": prompt, "seed": seed} for seed in seeds]
        try:
            self.objective.check_request(requests[0])
        except UserError as error:
            return [Refused(str(error), "prompt").told]
        passes = len(seeds) * self.objective.options.sampling_steps
        with (
            self.tracing.work("draw", trace),
            self.busy(passes * self.objective.image_facts(self.model.config)["tokens"]),
        ):
            return await self.drawn(requests)

    def _draw(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        options = self.objective.options
        self.forwards += options.sampling_steps * -(-len(requests) // options.images_together)
        self.rows += options.sampling_steps * len(requests)
        return self.objective.predict(self.model, requests)

    async def transcribe(self, content: bytes, job: dict[str, Any], trace: Trace | None = None) -> dict[str, Any]:
        """Write down what is said in an audio file, in a batch with others: {"text", "tokens", "seconds", "read", "written"}.

        With job["judged"] also {"avg_logprob"}: the mean log-probability of the tokens, in nats. Or one {"error"}.
        """
        hears: Any = self.objective
        try:
            if job["language"]:
                hears.prompt_in(job["language"])
        except UserError as error:
            return Refused(f"language: {error}", "language").told
        try:
            request = await asyncio.to_thread(self.objective.prepare, {"audio": content})
        except UserError as error:
            return Refused(f"file: {error}", "file").told
        extractor = hears.extractor
        seconds = len(request["sound"]) / extractor.sampling_rate
        read = math.ceil(seconds * self.model.config.max_source_positions / extractor.chunk_length)  # type: ignore[union-attr,operator]
        with self.tracing.work("transcribe", trace), self.reads([[0] * read]):
            (found,) = await self.transcribed([request | job])
        return found | {"seconds": seconds, "read": read, "written": len(found["tokens"])}

    def _transcribe(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.forwards, self.rows = self.forwards + 1, self.rows + len(requests)
        answers = self.objective.predict(self.model, requests)
        for request, answer in zip(requests, answers, strict=True):
            if request["judged"]:
                tokens = np.array([*answer["tokens"], self.objective.tokenizer.eos_token_id])
                tokens = tokens[: self.objective.sequence_length]
                (judged,) = self.objective.predict(self.model, [{"sound": request["sound"], "tokens": tokens}])
                answer["avg_logprob"] = float(np.mean(judged["logprobs"]))
        return answers

    async def complete(self, job: dict[str, Any], trace: Trace | None = None) -> dict[str, Any]:
        """Run a job to its end: {"head", "choices": [{"text", "reason", "tokens", "logprobs"}]}, or {"error", "param", "status"}."""
        try:
            with self.tracing.work("complete", trace) as work:
                head, followed = await self._begin(job)
                work.completions = [it.completion for it in followed]
                choices = [event async for events in self._follow(job, followed) for event in events]
            choices.sort(key=lambda choice: choice["index"])
            return {"head": head | self._reused(followed), "choices": choices}
        except Refused as refused:
            return refused.told

    async def stream(self, job: dict[str, Any], trace: Trace | None = None) -> AsyncIterator[dict[str, Any]]:
        """Yield {"head"}, then {"events"} as they come; {"error", "param", "status"} at any time, and nothing after it."""
        try:
            with self.tracing.work("stream", trace) as work:
                head, followed = await self._begin(job)
                work.completions = [it.completion for it in followed]
                told = False
                async for events in self._follow(job, followed):
                    if not told:
                        yield {"head": head | self._reused(followed)}
                    told = True
                    yield {"events": events}
        except Refused as refused:
            yield refused.told

    async def _begin(self, job: dict[str, Any]) -> tuple[dict[str, Any], list[Followed]]:
        """Tokenize a job's prompts and queue its completions, `n` of each. Raises Refused."""
        assert self.generator is not None
        if job["adapter"] not in ("", *self.options.adapters):  # asked of a version on trial, which had it
            raise Refused(f"there is no adapter '{job['adapter']}' here", "model", status=404)
        tokenizer, stop = self.objective.tokenizer, list(job["stop"])
        if "messages" in job:
            try:
                ids, more = chat_prompt(tokenizer, job["messages"])
            except TemplateError as error:
                raise Refused(str(error), "messages") from error
            prompts, stop = [ids or [tokenizer.eos_token_id]], stop + more
            texts = [""]
        else:
            prompts = [await self._ids(prompt) for prompt in job["prompts"]]
            texts = (
                [it if isinstance(it, str) else tokenizer.decode(it) for it in job["prompts"]] if job["echo"] else []
            )
        reader, copies = Reader(), range(job["n"])
        completions = [self._completion(job, prompt, copy, bool(stop), reader) for prompt in prompts for copy in copies]
        if job["schema"]:
            for completion, mask in zip(completions, await self._masks(job["schema"], len(completions)), strict=True):
                completion.mask = mask
        try:
            self.generator.submit(completions)
        except QueueFull as error:
            raise Refused("too many requests wait: try again in a second", status=429) from error
        head = {"prompt_tokens": sum(map(len, prompts)), "texts": [text for text in texts for _ in range(job["n"])]}
        return head, [
            Followed(it, Detokenizer(tokenizer, it.prompt, stop), Logprobs(tokenizer, it, job["echo"]))
            for it in completions
        ]

    async def _masks(self, schema: str, count: int) -> list[Mask]:
        """Return the masks of completions that are JSON of a schema. Raises Refused for one that cannot be followed."""

        def make() -> list[Mask]:
            self.structure = self.structure or Structure(self.objective.tokenizer)
            grammar = self.structure.grammar(schema)
            return [self.structure.mask(grammar) for _ in range(count)]

        try:
            return await asyncio.to_thread(make)
        except BadSchema as error:
            raise Refused(f"this schema cannot be followed: {error}", "response_format") from error

    async def _ids(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.objective.tokenizer
        if not isinstance(prompt, str):
            return prompt
        long = len(prompt) > LONG_TEXT
        ids: list[int] = (await asyncio.to_thread(tokenizer, prompt) if long else tokenizer(prompt))["input_ids"]
        return ids or [tokenizer.eos_token_id]

    def _completion(self, job: dict[str, Any], prompt: list[int], copy: int, stops: bool, reader: Reader) -> Completion:
        assert self.generator is not None
        limit, most = self.generator.limit, job["max_tokens"]
        if most is None:
            most = min(self.options.max_new_tokens, max(limit - len(prompt), 1))
        if len(prompt) + most > limit:
            raise Refused(
                f"the prompt's {len(prompt):,} tokens and max_tokens {most:,} are over the model's {limit:,} positions: use less",
                "max_tokens",
            )
        return Completion(
            prompt, most, SamplingParams(**job["sampling"]),
            seed=None if job["seed"] is None else job["seed"] + copy,
            logprobs=job["logprobs"], score_prompt=job["echo"] and job["logprobs"] is not None, client=job["client"],
            adapter=job["adapter"], schema=job["schema"] or "",
            deadline=time.monotonic() + self.options.queue_timeout_s, stepwise=job["stream"] or stops, reader=reader,
        )  # fmt: skip

    async def _follow(self, job: dict[str, Any], followed: list[Followed]) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield what is new of a job's completions until all have ended. Raises Refused for one that failed."""
        assert self.generator is not None
        reader = followed[0].completion.reader
        self.writing.update(it.completion for it in followed)
        try:
            while not all(it.ended for it in followed):
                await reader.news.wait()
                reader.news.clear()
                events = [self._event(job, i, it) for i, it in enumerate(followed) if not it.ended]
                if new := [event for event in events if event]:
                    yield new
        finally:  # also when the client has hung up
            self.writing.difference_update(it.completion for it in followed)
            if left := [it.completion for it in followed if not it.completion.reason]:
                self.generator.cancel(left)

    def _event(self, job: dict[str, Any], index: int, it: Followed) -> dict[str, Any] | None:
        """Return what is new of a completion, if its reader wants to know."""
        assert self.generator is not None
        reason = it.completion.reason  # read first: it is set last
        if reason == "error":
            raise Refused(it.completion.error, status=500)
        if reason == "expired":
            raise Refused("no place was free in time: try again in a second", status=503)
        tokens = it.completion.tokens[it.seen :]
        it.seen += len(tokens)
        it.text.add(tokens)
        if reason:
            it.text.end()
        if it.text.stopped and not reason:
            self.generator.cancel([it.completion])
        it.ended = it.text.stopped or reason is not None
        if not (it.ended or job["stream"]):
            return None
        text = it.text.take(last=it.ended)
        if not (text or it.ended):
            return None
        logprobs = None
        if job["logprobs"] is not None:
            # Completions tell the token that ended them too, as OpenAI's do; lm-eval counts on it.
            end = reason == "stop" and not it.text.stopped and "messages" not in job
            tell = it.logprobs.for_chat if "messages" in job else it.logprobs.take
            logprobs = tell(it.text.count + end)
        return {
            "index": index, "text": text, "tokens": it.text.count, "logprobs": logprobs,
            "reason": ("stop" if it.text.stopped else reason) if it.ended else None,
            "times": times(it.completion) if it.ended else None,
        }  # fmt: skip

    def _reused(self, followed: list[Followed]) -> dict[str, int]:
        return {"cached_tokens": sum(it.completion.reused for it in followed)}


def loaded(bundle: Bundle, options: ServeConfig) -> nn.Module:
    """Return a bundle's model where it is to run. Raises UserError if it was changed or answers otherwise than recorded.

    8-bit weights are made of those that were verified and have answered, and then answer again.
    """
    bundle.verify()
    has_bf16, smaller = torch.cuda.is_available() or _cpu_has_bf16(), options.quantize == "int8"
    dtype = PRECISIONS[options.precision]
    if options.precision == "auto" and smaller and has_bf16:
        dtype = torch.bfloat16
    model = bundle.model(dtype)
    if options.precision == "auto" and not has_bf16:
        model = model.float()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if smaller:
        bundle.replay(model)
        quantize(model)
    pack_linear(model)
    bundle.replay(model)
    return model


def dtype_for(bundle: Bundle, options: ServeConfig) -> torch.dtype:
    """Return the precision in which vLLM is to run a bundle."""
    has_bf16 = torch.cuda.is_available() or _cpu_has_bf16()
    return PRECISIONS[options.precision] or (bundle.written_in() if has_bf16 else torch.float32)


def leave() -> None:
    """End this replica at once: its requests go to another, and Serve starts it anew."""
    os._exit(1)


def replica_id() -> str:
    """Return Serve's name of this replica; none outside of Serve."""
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return ""


def times(completion: Completion) -> dict[str, float]:
    """Return the seconds that an ended completion waited for its place, for its first token, and between two, if it did."""
    found = {"queued": completion.placed_at - completion.queued_at}
    if completion.first_at:
        found["first"] = completion.first_at - completion.queued_at
    if len(completion.tokens) > 1:
        ended = completion.ended_at or time.monotonic()  # a stop text ends it for its reader before its lane is free
        found["between"] = (ended - completion.first_at) / (len(completion.tokens) - 1)
    return found


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))

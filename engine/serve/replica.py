"""A replica: loads one bundle, verifies and replays it, and then processes jobs.

Its methods that take a job return the job's result, or a `Failure`; an exception means that the replica is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.nn.functional as F
from ray import serve
from ray.serve.exceptions import RayServeException
from transformers import AutoConfig

from engine.bundles.bundle import Bundle
from engine.config import ServeConfig
from engine.errors import UserError
from engine.objectives.contract import pad_rows
from engine.serve.batching import DynamicBatcher
from engine.serve.jobs import (
    Classification,
    ClassificationJob,
    ClassificationResult,
    EmbeddingJob,
    EmbeddingResult,
    Failure,
    GenerationJob,
    GenerationResult,
    ImageJob,
    ImageResult,
    ImageSize,
    ModelInfo,
    Prompt,
    StreamChunk,
    StreamMessage,
    TranscriptionJob,
    TranscriptionResult,
)
from engine.serve.llm.completions import Completions, JobRejected, notify_listeners, prompt_info, token_ids
from engine.serve.llm.engine import LLMEngine, TransformersEngine
from engine.serve.llm.lora import LoraAdapters
from engine.serve.llm.model_runner import max_positions
from engine.serve.llm.vllm_engine import verified_engine
from engine.serve.load_model import dtype_for, load_model
from engine.serve.routing.autoscaling import IPC_REQUESTS, TOKENS_IN_FLIGHT
from engine.serve.routing.ipc import IpcAddress, IpcServer
from engine.serve.routing.loopback import bind_to_loopback
from engine.serve.short_lived_thread import run_in_short_lived_thread
from engine.serve.tracing import TraceHeaders, Tracing

CHARACTERS_PER_TOKEN = 4  # about, of English: https://help.openai.com/en/articles/4936856
VERSION_DIGITS = 12  # of a bundle's hash
MAX_BATCHED_TOKENS = 256  # in a forward of TransformersEngine, unless serve.max_batched_tokens is given


class Replica:
    """Serves one bundle; deployed by `application`."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        """Load the bundle. Raises UserError, and so gets no traffic, if it was changed or its outputs differ from the recorded ones."""
        bind_to_loopback()
        self.options = ServeConfig(**options)
        self.ipc_server = IpcServer(self)
        torch.set_num_threads(max(1, round(self.options.cpus_per_replica)))
        self.bundle = Bundle.open(Path(folder))
        resource = {"service.instance.id": replica_id(), "manta.version": self.bundle.hash[:VERSION_DIGITS]}
        self.tracing = Tracing(self.options.tracing, resource)
        self.objective = self.bundle.objective()
        self.num_input_tokens = 0  # of the inputs in flight that are no generation jobs, about
        self.num_forwards = self.num_rows = 0  # of these inputs
        self.engine: LLMEngine | None = None
        if self.options.generator == "vllm":
            self.config = AutoConfig.from_pretrained(self.bundle.folder, local_files_only=True)
            dtype = dtype_for(self.bundle, self.options)
            vllm = verified_engine(self.bundle, self.options, dtype, notify_listeners, exit_process)
            self.engine, self.device = vllm, vllm.info.device
        else:
            self.model = run_in_short_lived_thread(lambda: load_model(self.bundle, self.options))
            self.config, self.device = self.model.config, str(self.model.device)
        self.max_positions = max_positions(self.config) or self.objective.sequence_length
        if self.objective.is_causal and self.engine is None:
            self.engine = self._transformers_engine()
        if self.engine:
            self.completions = Completions(
                self.engine, self.objective.tokenizer, self.options.adapters, self.options.max_new_tokens,
                self.options.queue_timeout_s,
            )  # fmt: skip
        batcher = partial(
            DynamicBatcher, max_batch_size=self.options.max_num_seqs, wait_s=self.options.batch_wait_s,
            executor=ThreadPoolExecutor(1),
        )  # fmt: skip
        self.classify_batcher, self.embed_batcher = batcher(self._classify), batcher(self._embed)
        self.image_batcher, self.transcribe_batcher = batcher(self._generate_images), batcher(self._transcribe)

    def _transformers_engine(self) -> TransformersEngine:
        options = self.options
        draft = Bundle.open(options.draft_model) if options.draft_model else None
        return TransformersEngine(
            self.model, self.max_positions, max_num_seqs=options.max_num_seqs, max_queue=options.max_queue,
            max_batched_tokens=options.max_batched_tokens or MAX_BATCHED_TOKENS, kv_cache_tokens=options.kv_cache_tokens,
            num_speculative_tokens=options.num_speculative_tokens,
            draft_model=run_in_short_lived_thread(lambda: load_model(draft, options)) if draft else None,
            compiled=options.compile, on_output=notify_listeners,
            adapters=LoraAdapters(self.model, options.adapters, options.max_adapters),
        )  # fmt: skip

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the tokens that all queued and running jobs have yet to process, and the number of requests by sockets."""
        num_tokens = self.num_input_tokens + (self.completions.num_pending_tokens if self.engine else 0)
        return {TOKENS_IN_FLIGHT: float(num_tokens), IPC_REQUESTS: float(self.ipc_server.num_in_flight)}

    async def ipc_address(self) -> IpcAddress:
        """Return where an ingress on this node connects to this replica; the first call starts to listen."""
        await self.ipc_server.start()
        return IpcAddress(ray.get_runtime_context().get_node_id(), self.ipc_server.socket_name)

    def __del__(self) -> Awaitable[None] | None:
        """Finish the calls that came by sockets before the process ends: Serve awaits this."""
        return self.ipc_server.close(self.options.drain_s) if self.ipc_server.is_listening else None

    @contextlib.contextmanager
    def count_inputs(self, inputs: Sequence[Prompt]) -> Iterator[None]:
        """Count the tokens of some inputs as in flight during a block."""
        lengths = (len(text) // (CHARACTERS_PER_TOKEN if isinstance(text, str) else 1) + 1 for text in inputs)
        with self.count_tokens(sum(lengths)):
            yield

    @contextlib.contextmanager
    def count_tokens(self, num_tokens: int) -> Iterator[None]:
        """Count some tokens as in flight during a block."""
        self.num_input_tokens += num_tokens
        try:
            yield
        finally:
            self.num_input_tokens -= num_tokens

    def check_health(self) -> None:
        """Raise if no generation job would finish any more; Serve then replaces this replica."""
        if self.engine and not self.engine.is_alive:
            raise RuntimeError("the generation engine has ended")

    def describe(self) -> ModelInfo:
        """Return what the ingress needs to know to check requests."""
        config: Any = self.config
        image = self.objective.image_output_size(self.config)
        return ModelInfo(
            task=self.objective.endpoint_task or self.objective.options.name,
            hash=self.bundle.hash,
            max_positions=self.engine.max_seq_len if self.engine else self.max_positions,
            vocab_size=getattr(config, "vocab_size", 0),
            can_embed=self.objective.can_embed and self.options.generator == "transformers",
            audio_positions=getattr(config, "max_source_positions", 0),
            adapters={name: pin["hash"] for name, pin in self.options.adapters.items()},
            image=ImageSize(image["side"], image["tokens"]) if image else None,
        )

    def load_stats(self) -> dict[str, Any]:
        """Return the figures of this replica: those of `metrics.REPLICA_METRICS`, its id, version and device."""
        stats = self.engine.stats if self.engine else {}
        return stats | {
            "replica": replica_id(), "version": self.bundle.hash[:VERSION_DIGITS], "device": self.device,
            "steps": self.num_forwards + stats.get("steps", 0), "rows": self.num_rows + stats.get("rows", 0),
            "by_lanes": self.ipc_server.num_requests,
        }  # fmt: skip

    async def classify(self, job: ClassificationJob, trace: TraceHeaders | None = None) -> ClassificationResult:
        """Classify texts, in batches with those of other requests that come at about the same time."""
        with self.tracing.replica_span("classify", trace), self.count_inputs(job.texts):
            return ClassificationResult(await self.classify_batcher(job.texts))

    def _classify(self, texts: list[str]) -> list[Classification]:
        self._count_forwards(1, len(texts))
        predictions = self.objective.predict(self.model, [{"text": text} for text in texts])
        lengths = [len(ids) for ids in self.objective.tokenizer(texts)["input_ids"]]
        return [
            Classification(prediction["label"], prediction["scores"], length)
            for prediction, length in zip(predictions, lengths, strict=True)
        ]

    async def embed(self, job: EmbeddingJob, trace: TraceHeaders | None = None) -> EmbeddingResult | Failure:
        """Return the mean of each input's last hidden states, normalized to length 1."""
        rows = [await token_ids(self.objective.tokenizer, text) for text in job.inputs]
        max_length = max(map(len, rows))
        if max_length > self.max_positions:
            return Failure(
                f"an input has {max_length:,} tokens, over the model's {self.max_positions:,} positions: use less",
                "input",
            )
        with self.tracing.replica_span("embed", trace), self.count_inputs(rows):
            vectors = await self.embed_batcher(rows)
        return EmbeddingResult(vectors, sum(map(len, rows)))

    @torch.inference_mode()
    def _embed(self, rows: list[list[int]]) -> list[list[float]]:
        self._count_forwards(1, len(rows))
        padded = pad_rows(rows, self.objective.tokenizer.pad_token_id)  # type: ignore[arg-type]
        ids_BL, mask_BL = (tensor.to(self.model.device) for tensor in padded)  # type: ignore[arg-type]
        hidden_BLD = self.model.base_model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state.float()  # type: ignore[operator]
        mean_BD = (hidden_BLD * mask_BL[:, :, None]).sum(1) / mask_BL.sum(1, keepdim=True)
        vectors: list[list[float]] = F.normalize(mean_BD, dim=1).tolist()
        return vectors

    async def generate_images(self, job: ImageJob, trace: TraceHeaders | None = None) -> ImageResult | Failure:
        """Generate an image of a prompt from each seed."""
        requests = [{"prompt": job.prompt, "seed": seed} for seed in job.seeds]
        try:
            self.objective.check_request(requests[0])
        except UserError as error:
            return Failure(str(error), "prompt")
        num_forwards = len(job.seeds) * self.objective.options.sampling_steps
        num_tokens = num_forwards * self.objective.image_output_size(self.model.config)["tokens"]
        with self.tracing.replica_span("draw", trace), self.count_tokens(num_tokens):
            return ImageResult(await self.image_batcher(requests))

    def _generate_images(self, requests: list[dict[str, Any]]) -> list[str]:
        options = self.objective.options
        num_batches = -(-len(requests) // options.images_together)
        self._count_forwards(options.sampling_steps * num_batches, options.sampling_steps * len(requests))
        return [prediction["image"] for prediction in self.objective.predict(self.model, requests)]

    async def transcribe(
        self, job: TranscriptionJob, trace: TraceHeaders | None = None
    ) -> TranscriptionResult | Failure:
        """Transcribe an audio file, in a batch with others."""
        objective: Any = self.objective
        try:
            if job.language:
                objective.prompt_for_language(job.language)
        except UserError as error:
            return Failure(f"language: {error}", "language")
        try:
            request = await asyncio.to_thread(objective.prepare, {"audio": job.audio})
        except UserError as error:
            return Failure(f"file: {error}", "file")
        extractor = objective.feature_extractor
        duration_s = len(request["sound"]) / extractor.sampling_rate
        num_positions = math.ceil(duration_s * self.model.config.max_source_positions / extractor.chunk_length)  # type: ignore[union-attr,operator]
        options = {"temperature": job.temperature, "language": job.language, "with_logprob": job.with_logprob}
        with self.tracing.replica_span("transcribe", trace), self.count_inputs([[0] * num_positions]):
            (prediction,) = await self.transcribe_batcher([request | options])
        return TranscriptionResult(
            prediction["text"], prediction["tokens"], duration_s, num_positions, len(prediction["tokens"]),
            prediction.get("avg_logprob"),
        )  # fmt: skip

    def _transcribe(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._count_forwards(1, len(requests))
        predictions = self.objective.predict(self.model, requests)
        for request, prediction in zip(requests, predictions, strict=True):
            if request["with_logprob"]:
                tokens = np.array([*prediction["tokens"], self.objective.tokenizer.eos_token_id])
                tokens = tokens[: self.objective.sequence_length]
                (scored,) = self.objective.predict(self.model, [{"sound": request["sound"], "tokens": tokens}])
                prediction["avg_logprob"] = float(np.mean(scored["logprobs"]))
        return predictions

    def _count_forwards(self, num_forwards: int, num_rows: int) -> None:
        self.num_forwards, self.num_rows = self.num_forwards + num_forwards, self.num_rows + num_rows

    async def complete(self, job: GenerationJob, trace: TraceHeaders | None = None) -> GenerationResult | Failure:
        """Run a generation job to its end."""
        try:
            with self.tracing.replica_span("complete", trace) as span:
                prompt_tokens, texts, states = await self.completions.begin(job)
                span.sequences = [state.sequence for state in states]
                choices = [choice async for new in self.completions.follow(job, states) for choice in new]
            choices.sort(key=lambda choice: choice.index)
            return GenerationResult(prompt_info(prompt_tokens, texts, states), choices)
        except JobRejected as error:
            return error.failure

    async def stream(self, job: GenerationJob, trace: TraceHeaders | None = None) -> AsyncIterator[StreamMessage]:
        """Yield a PromptInfo, then StreamChunks as tokens come; a Failure at any time, and nothing after it."""
        try:
            with self.tracing.replica_span("stream", trace) as span:
                prompt_tokens, texts, states = await self.completions.begin(job)
                span.sequences = [state.sequence for state in states]
                is_first = True
                async for choices in self.completions.follow(job, states):
                    if is_first:
                        yield prompt_info(prompt_tokens, texts, states)
                    is_first = False
                    yield StreamChunk(choices)
        except JobRejected as error:
            yield error.failure


def exit_process() -> None:
    """End this replica at once: its requests go to another one, and Serve starts it again."""
    os._exit(1)


def replica_id() -> str:
    """Return Serve's id of this replica; empty outside of Serve."""
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return ""

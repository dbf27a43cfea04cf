"""One replica: a bundle that is verified, replayed and then answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from ray import serve

from engine.bundles.bundle import Bundle
from engine.config import ServeConfig
from engine.serve.generation import Completion, Generator, QueueFull

TASKS = {"AutoModelForCausalLM": "completion", "AutoModelForSequenceClassification": "classification"}


class Replica:
    """Serves one bundle; deployed by `deploy`."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        """Load the bundle. Raises UserError, and so takes no traffic, if it was changed or answers otherwise than recorded."""
        self.options = ServeConfig(**options)
        torch.set_num_threads(max(1, round(self.options.cpus_per_replica)))
        self.bundle = Bundle.open(Path(folder))
        self.bundle.verify()
        self.objective = self.bundle.objective()
        model = self.bundle.model()
        if not torch.cuda.is_available() and not _cpu_has_bf16():
            model = model.float()
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.bundle.replay(self.model)
        self.generator = None
        if self.objective.auto_class == "AutoModelForCausalLM":
            self.generator = Generator(
                self.model, self.objective.tokenizer, self.options.max_batch, self.options.max_queue
            )
        together: Any = self.classify_batch  # Serve gives the decorated method these setters
        together.set_max_batch_size(self.options.max_batch)
        together.set_batch_wait_timeout_s(self.options.batch_wait_s)

    def check_health(self) -> None:
        """Raise if no completion would end any more; Serve then replaces this replica."""
        if self.generator and not self.generator.alive:
            raise RuntimeError("the generator's thread has ended")

    def describe(self) -> dict[str, Any]:
        """Return what the ingress needs to know to check requests."""
        config: Any = self.model.config
        return {
            "task": TASKS.get(self.objective.auto_class, self.objective.options.name),
            "positions": positions(config) or self.objective.sequence_length,
            "vocabulary": config.vocab_size,
            "hash": self.bundle.hash,
        }

    async def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        """Classify a request's texts, in batches with those of other requests that come at about the same time."""
        return list(await asyncio.gather(*(self.classify_batch(text) for text in texts)))

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def classify_batch(self, texts: list[str]) -> list[dict[str, Any]]:
        """Answer a batch off the event loop."""
        requests = [{"text": text} for text in texts]
        answers = await asyncio.to_thread(self.objective.predict, self.model, requests)
        lengths = [len(ids) for ids in self.objective.tokenizer(texts)["input_ids"]]
        return [answer | {"tokens": length} for answer, length in zip(answers, lengths, strict=True)]

    async def complete(self, prompt: str | list[int], options: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield {"prompt_tokens", "prompt_text"}, then {"text", "reason", "tokens"} as they come; or one {"error"}."""
        assert self.generator is not None
        tokenizer = self.objective.tokenizer
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        ids = ids or [tokenizer.eos_token_id]
        positions = self.describe()["positions"]
        if len(ids) + options["max_tokens"] > positions:
            yield {"error": f"the prompt's {len(ids):,} tokens and max_tokens {options['max_tokens']:,} are over the model's {positions:,} positions: use less", "param": "max_tokens"}  # fmt: skip
            return
        events: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(text: str, reason: str | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (text, reason))

        completion = Completion(ids, tell=tell, **options)
        try:
            self.generator.submit(completion)
        except QueueFull:
            yield {"error": "too many requests wait: try again in a second", "param": None, "status": 429}
            return
        try:
            yield {
                "prompt_tokens": len(ids),
                "prompt_text": prompt if isinstance(prompt, str) else tokenizer.decode(ids),
            }
            reason = None
            while reason is None:
                text, reason = await events.get()
                yield {"text": text, "reason": reason, "tokens": len(completion.tokens)}
        finally:
            completion.cancelled = True  # frees the place when the client has hung up


def positions(config: Any) -> int | None:
    """Return how many tokens a sequence may have; a sliding window's length, where only newer keys would be kept."""
    most: int | None = getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(most, window) if most and window else most


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))

"""Causal language modeling: predict the next token (Radford et al. 2019). Shapes: B batch, L length, M = L + 1, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.packing import pack
from engine.data.shards import Split
from engine.models.cross_entropy import IGNORE_INDEX
from engine.models.document_mask import document_mask
from engine.objectives import contract
from engine.objectives.contract import Batch, Samples, pad_rows


class CausalLM(contract.LMHeadObjective):
    """Documents concatenated and split into blocks of `sequence_length`, each token a target once; or as data.packing says."""

    auto_class = "AutoModelForCausalLM"
    architectures = ("ForCausalLM", "LMHeadModel")
    pipeline_tag = "text-generation"
    intended_use = "continuing text like its training data"
    endpoint_task = "completion"
    can_embed = True
    is_causal = True
    supports_packing = True
    supports_sequence_parallel = True
    evaluation_metrics = ("bits_per_byte",)
    peft_task_type = "CAUSAL_LM"

    def samples(self, split: Split) -> Samples:
        """Pack the split's documents."""
        return pack(split, self.sequence_length, self.packing, overlap=1)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Tokenize a text, truncated to sequence_length + 1 tokens."""
        ids = self.tokenizer(example["text"])["input_ids"][: self.sequence_length + 1]
        return {"tokens": np.asarray(ids, dtype=np.int64)}

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Shift: the target of a position is the next token, unless that starts another document of a packed sample."""
        rows = [sample["tokens"] for sample in samples]
        # All batches have one shape with best_fit, or torch.compile would compile again.
        width = self.sequence_length + 1 if self.packing.method == "best_fit" else 0
        tokens_BM, _ = pad_rows(rows, pad_id=IGNORE_INDEX, width=width)
        inputs_BL, targets_BL = tokens_BM[:, :-1], tokens_BM[:, 1:].contiguous()
        inputs = {"input_ids": inputs_BL.clamp(min=0)}
        if "starts" in samples[0]:
            for i, sample in enumerate(samples):
                targets_BL[i, torch.as_tensor(sample["starts"][1:] - 1)] = IGNORE_INDEX
            if self.packing.within_documents:
                starts, lengths = [sample["starts"] for sample in samples], [len(row) - 1 for row in rows]
                inputs |= document_mask(starts, lengths, inputs_BL.shape[1], causal=True)
        count = int((targets_BL != IGNORE_INDEX).sum())
        return Batch(inputs, targets_BL, count=count, tokens=sum(len(row) - 1 for row in rows))

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Continue each {"prompt", "max_tokens"} greedily, or return the logprobs of each {"prompt", "continuation"} of token ids.

        Requests are not batched, so that no request changes the answer of another.
        """
        return [
            self._continuation_logprobs(model, request) if "continuation" in request else self._generate(model, request)
            for request in requests
        ]

    def _generate(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        prompt_BL = self._prompt_ids(request["prompt"], next(model.parameters()).device)
        output_BL = model.generate(  # type: ignore[operator]
            prompt_BL,
            attention_mask=torch.ones_like(prompt_BL),
            max_new_tokens=request.get("max_tokens", 16),
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new_ids = output_BL[0, prompt_BL.shape[1] :].tolist()
        return {"text": self.tokenizer.decode(new_ids, skip_special_tokens=True), "tokens": new_ids}

    def _continuation_logprobs(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        """Return the log-probability, in nats, of each token of the continuation."""
        prompt, continuation = request["prompt"], request["continuation"]
        ids_BL = self._prompt_ids(prompt + continuation, next(model.parameters()).device)
        logits_LV = model(input_ids=ids_BL, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logprobs_L = logits_LV.log_softmax(1).gather(1, ids_BL[0, len(prompt) :, None])[:, 0]
        return {"logprobs": logprobs_L.tolist()}

    def _prompt_ids(self, prompt: str | list[int], device: torch.device) -> Tensor:
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        return torch.tensor([ids or [self.tokenizer.eos_token_id]], device=device)

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take the first tokens of three documents as prompts, with their continuations."""
        documents = [split.document(i)[:20].tolist() for i in range(min(3, split.num_rows))]
        return [{"prompt": ids[:12], "continuation": ids[12:]} for ids in documents if len(ids) > 12]

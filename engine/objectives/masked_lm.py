"""Masked language modeling: predict masked tokens (Devlin et al. 2019, BERT).

Shapes: B batch, L length, V vocabulary, K masked tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from engine.data.order import splitmix64
from engine.data.packing import pack
from engine.data.shards import Split
from engine.errors import UserError
from engine.models.cross_entropy import IGNORE_INDEX
from engine.models.document_mask import document_mask
from engine.objectives import contract
from engine.objectives.contract import Batch, Samples, Scores, pad_rows


class MaskedLM(contract.LMHeadObjective):
    """Samples of up to `sequence_length` tokens with dynamic masking (RoBERTa): mask_rate of them, others in each epoch."""

    auto_class = "AutoModelForMaskedLM"
    architectures = ("ForMaskedLM",)
    pipeline_tag = "fill-mask"
    intended_use = "predicting masked tokens, and as a base for fine-tuning"
    can_embed = True
    supports_packing = True
    supports_sequence_parallel = True
    forward_options: ClassVar[dict[str, Any]] = {}

    def model_options(self) -> dict[str, Any]:
        """Set no option of the model. Raises UserError if the tokenizer has no mask token."""
        if self.tokenizer.mask_token_id is None:
            raise UserError(
                "the tokenizer has no mask_token, which objective=masked_lm needs: leave data.tokenizer out, or use one that has it"
            )
        return {}

    def num_target_tokens(self, num_tokens: int) -> int:
        """Return how many of a sample's tokens are masked."""
        return round(self.options.mask_rate * num_tokens)

    def samples(self, split: Split) -> Samples:
        """Pack the split's documents."""
        return pack(split, self.sequence_length, self.packing, overlap=0)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Tokenize a text, truncated to sequence_length tokens."""
        ids = self.tokenizer(example["text"], truncation=True, max_length=self.sequence_length)["input_ids"]
        return {"tokens": np.asarray(ids, dtype=np.int64)}

    def mask(self, tokens_L: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Choose the targets; mask 80 % of them, replace 10 % by random tokens, keep 10 %. Returns inputs_L and targets_L."""
        seed = splitmix64(np.array([draw % 2**64], np.uint64))
        first_L = splitmix64(seed ^ np.arange(len(tokens_L), dtype=np.uint64))
        second_L = splitmix64(first_L)
        special_L = np.isin(tokens_L, self.tokenizer.all_special_ids)
        order_L = np.where(special_L, np.iinfo(np.uint64).max, first_L).argsort(kind="stable")
        count = min(max(1, round(self.options.mask_rate * len(tokens_L))), int((~special_L).sum()))
        chosen_K = order_L[:count]
        targets_L = np.full_like(tokens_L, IGNORE_INDEX)
        targets_L[chosen_K] = tokens_L[chosen_K]
        action_K = second_L[chosen_K] % np.uint64(10)  # 0 to 7: mask, 8: replace, 9: keep
        random_K = (splitmix64(second_L[chosen_K]) % np.uint64(len(self.tokenizer))).astype(np.int64)
        inputs_L = tokens_L.copy()
        inputs_L[chosen_K] = np.select(
            [action_K < 8, action_K == 8], [np.int64(self.tokenizer.mask_token_id), random_K], tokens_L[chosen_K]
        )
        return inputs_L, targets_L

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Mask each sample by its draw; if attention stays within documents, positions restart at each."""
        pairs = [self.mask(sample["tokens"][: self.sequence_length], int(sample.get("draw", 0))) for sample in samples]
        # All batches have one shape with best_fit, or torch.compile would compile again.
        width = self.sequence_length if self.packing.method == "best_fit" else 0
        ids_BL, mask_BL = pad_rows([inputs for inputs, _ in pairs], self.tokenizer.pad_token_id, width)
        targets_BL, _ = pad_rows([targets for _, targets in pairs], IGNORE_INDEX, width)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if self.packing.within_documents and "starts" in samples[0]:
            starts, lengths = [sample["starts"] for sample in samples], [len(inputs) for inputs, _ in pairs]
            inputs |= document_mask(starts, lengths, ids_BL.shape[1], causal=False)
        return Batch(inputs, targets_BL, count=int((targets_BL != IGNORE_INDEX).sum()), tokens=int(mask_BL.sum()))

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Return the loss in nats per masked token, its exponential (pseudo-perplexity), and the accuracy over masked tokens."""
        accuracy = float(scores["correct"].sum()) / float(scores["tokens"].sum())
        return super().summarize(scores) | {"accuracy": accuracy}

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Fill the masks of each {"text"} or {"tokens"}: the likeliest token of each mask, in order, and its logprob in nats.

        Requests are not batched, so that no request changes the answer of another.
        """
        return [self._fill_masks(model, request) for request in requests]

    def _fill_masks(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        ids = request["tokens"] if "tokens" in request else self.tokenizer(request["text"])["input_ids"]
        ids_BL = torch.tensor([ids], device=next(model.parameters()).device)
        masked_K = (ids_BL[0] == self.tokenizer.mask_token_id).nonzero()[:, 0]
        logits_LV = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits[0].float()
        logprobs_K, filled_K = logits_LV[masked_K].log_softmax(1).max(1)
        ids_BL[0, masked_K] = filled_K
        text = self.tokenizer.decode(ids_BL[0].tolist(), skip_special_tokens=True)
        return {"text": text, "tokens": filled_K.tolist(), "logprobs": logprobs_K.tolist()}

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take the first tokens of three documents and mask two tokens of each."""
        mask_id = self.tokenizer.mask_token_id
        documents = [split.document(i)[:16].tolist() for i in range(min(3, split.num_rows))]
        masked = [[mask_id if position in (4, 9) else t for position, t in enumerate(ids)] for ids in documents]
        return [{"tokens": ids} for ids in masked if mask_id in ids]

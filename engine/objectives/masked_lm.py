"""Predict tokens that were masked (Devlin et al. 2019, BERT). Shapes: B batch, L length, V vocabulary, K masked in a row."""

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
from engine.models.cross_entropy import IGNORED
from engine.models.document_mask import document_mask
from engine.objectives import contract
from engine.objectives.contract import Batch, Samples, Scores, pad_rows


class MaskedLM(contract.OverVocabulary):
    """Samples of up to `sequence_length` tokens, of which mask_rate are to be predicted: other ones each time (RoBERTa)."""

    auto_class = "AutoModelForMaskedLM"
    architectures = ("ForMaskedLM",)
    divisible = True
    forward_options: ClassVar[dict[str, Any]] = {}

    def model_options(self) -> dict[str, Any]:
        """Ask nothing of the model, but a mask token of the tokenizer."""
        if self.tokenizer.mask_token_id is None:
            raise UserError(
                "the tokenizer has no mask_token, which objective=masked_lm needs: leave data.tokenizer out, or take one that has"
            )
        return {}

    def predicted(self, tokens: int) -> int:
        """Return how many of a sample's tokens are masked."""
        return round(self.options.mask_rate * tokens)

    def samples(self, split: Split) -> Samples:
        """Pack the split's documents."""
        return pack(split, self.sequence_length, self.packing, overlap=0)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Tokenize a text, at most sequence_length tokens of it."""
        ids = self.tokenizer(example["text"], truncation=True, max_length=self.sequence_length)["input_ids"]
        return {"tokens": np.asarray(ids, dtype=np.int64)}

    def mask(self, tokens_L: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Choose the targets, and hide 80 % of them, change 10 %, leave 10 %: returns inputs_L and targets_L."""
        seed = splitmix64(np.array([draw % 2**64], np.uint64))
        first_L = splitmix64(seed ^ np.arange(len(tokens_L), dtype=np.uint64))
        second_L = splitmix64(first_L)
        special_L = np.isin(tokens_L, self.tokenizer.all_special_ids)
        rank_L = np.where(special_L, np.iinfo(np.uint64).max, first_L).argsort(kind="stable")
        count = min(max(1, round(self.options.mask_rate * len(tokens_L))), int((~special_L).sum()))
        chosen_K = rank_L[:count]
        targets_L = np.full_like(tokens_L, IGNORED)
        targets_L[chosen_K] = tokens_L[chosen_K]
        fate_K = second_L[chosen_K] % np.uint64(10)
        random_K = (splitmix64(second_L[chosen_K]) % np.uint64(len(self.tokenizer))).astype(np.int64)
        inputs_L = tokens_L.copy()
        inputs_L[chosen_K] = np.select(
            [fate_K < 8, fate_K == 8], [np.int64(self.tokenizer.mask_token_id), random_K], tokens_L[chosen_K]
        )
        return inputs_L, targets_L

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Mask each sample by its draw; where attention keeps to a document, positions restart at each."""
        pairs = [self.mask(sample["tokens"][: self.sequence_length], int(sample.get("draw", 0))) for sample in samples]
        width = self.sequence_length if self.packing.how == "best_fit" else 0  # one shape, which torch.compile asks for
        ids_BL, mask_BL = pad_rows([inputs for inputs, _ in pairs], self.tokenizer.pad_token_id, width)
        targets_BL, _ = pad_rows([targets for _, targets in pairs], IGNORED, width)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        if self.packing.within_documents and "starts" in samples[0]:
            starts, lengths = [sample["starts"] for sample in samples], [len(inputs) for inputs, _ in pairs]
            inputs |= document_mask(starts, lengths, ids_BL.shape[1], causal=False)
        return Batch(inputs, targets_BL, count=int((targets_BL != IGNORED).sum()), tokens=int(mask_BL.sum()))

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Give the loss in nats a masked token, its exponential (a pseudo-perplexity), and the share of tokens found."""
        accuracy = float(scores["found"].sum()) / float(scores["tokens"].sum())
        return super().summarize(scores) | {"accuracy": accuracy}

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Fill the masks of each {"text"}, or {"tokens"}, alone: the likeliest token of each, in order, and its log-probability in nats."""
        return [self._fill(model, request) for request in requests]

    def _fill(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        ids = request["tokens"] if "tokens" in request else self.tokenizer(request["text"])["input_ids"]
        ids_BL = torch.tensor([ids], device=next(model.parameters()).device)
        masked_K = (ids_BL[0] == self.tokenizer.mask_token_id).nonzero()[:, 0]
        logits_LV = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).logits[0].float()
        logprobs_K, found_K = logits_LV[masked_K].log_softmax(1).max(1)
        ids_BL[0, masked_K] = found_K
        text = self.tokenizer.decode(ids_BL[0].tolist(), skip_special_tokens=True)
        return {"text": text, "tokens": found_K.tolist(), "logprobs": logprobs_K.tolist()}

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take the first tokens of three documents and hide two of each."""
        starts = [split.document(i)[:16].tolist() for i in range(min(3, split.rows))]
        hidden = [[self.tokenizer.mask_token_id if at in (4, 9) else t for at, t in enumerate(ids)] for ids in starts]
        return [{"tokens": ids} for ids in hidden if self.tokenizer.mask_token_id in ids]

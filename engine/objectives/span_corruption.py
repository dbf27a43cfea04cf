"""Span corruption: predict spans that were removed (Raffel et al. 2020, T5, section 3.3.4). Shapes: B batch, L length, V vocabulary.

A sample's tokens are segmented into kept spans and noise spans, in turn. The input holds the kept spans, with a sentinel token
in place of each noise span; the target holds the sentinels, each followed by its span. Both end with the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.data.order import splitmix64
from engine.data.packing import pack
from engine.data.shards import Split
from engine.errors import UserError
from engine.models.cross_entropy import IGNORE_INDEX
from engine.models.size import TransformerStack, attention_flops, matmul_parameter_count, num_elements
from engine.objectives import contract
from engine.objectives.contract import Batch, Samples, pad_rows


class SpanCorruption(contract.LMHeadObjective):
    """Blocks of as many tokens as give a corrupted input of exactly `sequence_length`; other spans in each epoch."""

    auto_class = "AutoModelForSeq2SeqLM"
    architectures = ("ForConditionalGeneration",)
    pipeline_tag = "text2text-generation"
    intended_use = "predicting spans that are missing from a text, and as a base for fine-tuning"
    servable = False

    def model_options(self) -> dict[str, Any]:
        """Let the decoder start with padding, as T5's does. Raises UserError if the tokenizer has too few sentinels."""
        spans = self.corrupted_lengths(self.num_raw_tokens())[2]
        if len(self.sentinel_ids()) < spans:
            raise UserError(
                f"objective=span_corruption removes {spans} spans from a sample and the tokenizer has {len(self.sentinel_ids())} "
                f"sentinel tokens (<extra_id_N>): use data.sentinel_tokens={spans} or more, and no data.tokenizer without them"
            )
        return {"decoder_start_token_id": self.tokenizer.pad_token_id}

    def sentinel_ids(self) -> list[int]:
        """Return the ids of <extra_id_0>, <extra_id_1>, ..., as many as the tokenizer has."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        ids: list[int] = []
        while (token := vocabulary.get(f"<extra_id_{len(ids)}>")) is not None:
            ids.append(token)
        return ids

    def corrupted_lengths(self, num_raw_tokens: int) -> tuple[int, int, int]:
        """Return the tokens of the input and of the target made from so many raw tokens, and the number of noise spans."""
        noise = min(max(round(num_raw_tokens * self.options.noise_density), 1), num_raw_tokens - 1)
        spans = min(max(round(noise / self.options.mean_span), 1), noise, num_raw_tokens - noise)
        return num_raw_tokens - noise + spans + 1, noise + spans + 1, spans

    def num_raw_tokens(self) -> int:
        """Return the largest number of raw tokens whose corrupted input fits into sequence_length."""
        num_tokens = 2
        while self.corrupted_lengths(num_tokens + 1)[0] <= self.sequence_length:
            num_tokens += 1
        return num_tokens

    def transformer_stacks(self, config: Any) -> list[TransformerStack]:
        """Return the encoder, which reads the input, and the decoder, which reads the target."""
        inputs, targets, _ = self.corrupted_lengths(self.num_raw_tokens())
        return [TransformerStack(config, inputs), TransformerStack(config, targets)]

    def flops(self, model: nn.Module) -> float:
        """Sum encoder, decoder and output layer; the cross-attention's keys and values are computed once per input token."""
        config: Any = model.config
        input_tokens, target_tokens = (stack.tokens for stack in self.transformer_stacks(config))
        seq2seq: Any = model
        width, num_layers = config.num_heads * config.d_kv, config.num_decoder_layers
        cross_parameters = sum(
            num_elements(p)
            for name, p in seq2seq.decoder.named_parameters()
            if "EncDecAttention.k." in name or "EncDecAttention.v." in name
        )
        decoder_parameters = (
            matmul_parameter_count(seq2seq.decoder) - cross_parameters + num_elements(seq2seq.lm_head.weight)
        )
        return (
            input_tokens
            * (6 * matmul_parameter_count(seq2seq.encoder) + attention_flops(config.num_layers, width, input_tokens))
            + input_tokens * 6 * cross_parameters
            + target_tokens
            * (6 * decoder_parameters + attention_flops(num_layers, width, target_tokens + input_tokens))
        )

    def samples(self, split: Split) -> Samples:
        """Split the concatenated documents into blocks of raw tokens."""
        return pack(split, self.num_raw_tokens(), self.packing, overlap=0)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Tokenize a text, truncated to the raw tokens of a sample."""
        ids = self.tokenizer(example["text"], add_special_tokens=False)["input_ids"][: self.num_raw_tokens()]
        return {"tokens": np.asarray(ids, dtype=np.int64)}

    def corrupt(self, tokens_L: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Replace spans by sentinels: returns input and target, which together hold each token once."""
        end = [self.tokenizer.eos_token_id]
        if len(tokens_L) < 2:
            return np.concatenate([tokens_L, end]), np.array(end)
        num_inputs, num_targets, num_spans = self.corrupted_lengths(len(tokens_L))
        seed = splitmix64(np.array([draw % 2**64], np.uint64))
        kept_lengths = random_segmentation(num_inputs - num_spans - 1, num_spans, seed)
        noise_lengths = random_segmentation(num_targets - num_spans - 1, num_spans, splitmix64(seed))
        bounds = np.cumsum(np.stack([kept_lengths, noise_lengths], axis=1).ravel())[:-1]
        spans = np.split(tokens_L, bounds)  # kept, noise, kept, noise, ...
        sentinels = np.array(self.sentinel_ids()[:num_spans])[:, None]
        inputs = [part for pair in zip(spans[::2], sentinels) for part in pair]
        targets = [part for pair in zip(sentinels, spans[1::2]) for part in pair]
        return np.concatenate([*inputs, end]), np.concatenate([*targets, end])

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Corrupt each sample by its draw; the decoder's inputs are the targets shifted right."""
        num_tokens = self.num_raw_tokens()
        pairs = [self.corrupt(sample["tokens"][:num_tokens], int(sample.get("draw", 0))) for sample in samples]
        ids_BL, mask_BL = pad_rows([inputs for inputs, _ in pairs], self.tokenizer.pad_token_id)
        targets_BL, _ = pad_rows([targets for _, targets in pairs], IGNORE_INDEX)
        count = int((targets_BL != IGNORE_INDEX).sum())
        shifted_BL = F.pad(targets_BL[:, :-1], (1, 0), value=IGNORE_INDEX)
        inputs = {
            "input_ids": ids_BL,
            "attention_mask": mask_BL,
            "decoder_input_ids": shifted_BL.masked_fill(shifted_BL == IGNORE_INDEX, self.tokenizer.pad_token_id),
        }
        return Batch(inputs, targets_BL, count=count, tokens=int(mask_BL.sum()) + count)

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Fill the sentinels of each {"text", "max_tokens"} greedily, or return the logprobs of each {"tokens", "targets"}.

        Requests are not batched, so that no request changes the answer of another.
        """
        return [
            self._target_logprobs(model, request) if "targets" in request else self._fill_sentinels(model, request)
            for request in requests
        ]

    def _fill_sentinels(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        ids = self.tokenizer(request["text"], add_special_tokens=False)["input_ids"]
        ids_BL = torch.tensor([[*ids, self.tokenizer.eos_token_id]], device=next(model.parameters()).device)
        output_BL = model.generate(  # type: ignore[operator]
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            max_new_tokens=request.get("max_tokens", 32),
            do_sample=False,
        )
        output_ids = output_BL[0, 1:].tolist()
        sentinels = set(self.sentinel_ids())
        spans: dict[int, list[int]] = {}
        for token in output_ids:
            if token in sentinels:
                spans[token] = span = []
            elif token == self.tokenizer.eos_token_id:
                break
            elif spans:
                span.append(token)
        filled = [part for token in ids for part in (spans.get(token, []) if token in sentinels else [token])]
        return {"text": self.tokenizer.decode(filled, skip_special_tokens=True), "tokens": output_ids}

    def _target_logprobs(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        """Return the log-probability, in nats, of each token of the target."""
        device = next(model.parameters()).device
        ids_BL, targets_L = torch.tensor([request["tokens"]], device=device), torch.tensor(request["targets"])
        shifted_BL = F.pad(targets_L[None, :-1], (1, 0), value=self.tokenizer.pad_token_id).to(device)
        logits_LV = model(input_ids=ids_BL, decoder_input_ids=shifted_BL, use_cache=False).logits[0].float().cpu()
        return {"logprobs": logits_LV.log_softmax(1).gather(1, targets_L[:, None])[:, 0].tolist()}

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take the first tokens of three documents, corrupted."""
        documents = [split.document(i)[:24].astype(np.int64) for i in range(min(3, split.num_rows))]
        pairs = [self.corrupt(ids, 0) for ids in documents if len(ids) > 2]
        return [{"tokens": inputs.tolist(), "targets": targets.tolist()} for inputs, targets in pairs]


def random_segmentation(num_items: int, num_segments: int, seed: np.ndarray) -> np.ndarray:
    """Return the lengths, one or more each, of a uniformly random segmentation of so many items: int64 [num_segments]."""
    ranks = splitmix64(seed ^ np.arange(num_items - 1, dtype=np.uint64))
    ends = np.sort(ranks.argsort(kind="stable")[: num_segments - 1]) + 1
    return np.diff(np.concatenate([[0], ends, [num_items]]))

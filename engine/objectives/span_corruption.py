"""Predict spans that were cut out (Raffel et al. 2020, T5, section 3.3.4). Shapes: B batch, L length, V vocabulary.

A sample's tokens are cut into spans that stay and spans that go, in turn. The input has what stays, with a sentinel
token in place of each span that goes; the target has the sentinels, each with its span. Both end with the end token.
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
from engine.models.cross_entropy import IGNORED
from engine.models.size import Stack, attention_flops, elements, matmul_parameter_count
from engine.objectives import contract
from engine.objectives.contract import Batch, Samples, pad_rows


class SpanCorruption(contract.OverVocabulary):
    """Blocks of tokens, as many as make a corrupted input of just `sequence_length`; other spans each time."""

    auto_class = "AutoModelForSeq2SeqLM"
    architectures = ("ForConditionalGeneration",)
    servable = False

    def model_options(self) -> dict[str, Any]:
        """Let the decoder begin with padding, as T5's does; ask the tokenizer for a sentinel a span."""
        spans = self.lengths(self.raw_length())[2]
        if len(self.sentinels()) < spans:
            raise UserError(
                f"objective=span_corruption cuts {spans} spans out of a sample and the tokenizer has {len(self.sentinels())} "
                f"sentinel tokens (<extra_id_N>): use data.sentinel_tokens={spans} or more, and no data.tokenizer without them"
            )
        return {"decoder_start_token_id": self.tokenizer.pad_token_id}

    def sentinels(self) -> list[int]:
        """Return the ids of <extra_id_0>, <extra_id_1>, ..., as many as the tokenizer has."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        found: list[int] = []
        while (token := vocabulary.get(f"<extra_id_{len(found)}>")) is not None:
            found.append(token)
        return found

    def lengths(self, raw: int) -> tuple[int, int, int]:
        """Return the tokens of input and target that so many raw tokens give, and how many spans go."""
        noise = min(max(round(raw * self.options.noise_density), 1), raw - 1)
        spans = min(max(round(noise / self.options.mean_span), 1), noise, raw - noise)
        return raw - noise + spans + 1, noise + spans + 1, spans

    def raw_length(self) -> int:
        """Return the most raw tokens whose corrupted input fits into sequence_length."""
        raw = 2
        while self.lengths(raw + 1)[0] <= self.sequence_length:
            raw += 1
        return raw

    def stacks(self, config: Any) -> list[Stack]:
        """Return the encoder, which reads the input, and the decoder, which reads the target."""
        inputs, targets, _ = self.lengths(self.raw_length())
        return [Stack(config, inputs), Stack(config, targets)]

    def flops(self, model: nn.Module) -> float:
        """Add up encoder, decoder and output; the keys and values of the cross-attention are made of the input's tokens."""
        config: Any = model.config
        encoder, decoder = (stack.tokens for stack in self.stacks(config))
        bases: Any = model
        width, depth = config.num_heads * config.d_kv, config.num_decoder_layers
        crossed = [
            elements(p)
            for name, p in bases.decoder.named_parameters()
            if "EncDecAttention.k." in name or "EncDecAttention.v." in name
        ]
        of_decoder = matmul_parameter_count(bases.decoder) - sum(crossed) + elements(bases.lm_head.weight)
        return (
            encoder * (6 * matmul_parameter_count(bases.encoder) + attention_flops(config.num_layers, width, encoder))
            + encoder * 6 * sum(crossed)
            + decoder * (6 * of_decoder + attention_flops(depth, width, decoder + encoder))
        )

    def samples(self, split: Split) -> Samples:
        """Cut the split's stream into blocks of the raw length."""
        return pack(split, self.raw_length(), self.packing, overlap=0)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Tokenize a text, at most as many tokens of it as a sample has."""
        ids = self.tokenizer(example["text"], add_special_tokens=False)["input_ids"][: self.raw_length()]
        return {"tokens": np.asarray(ids, dtype=np.int64)}

    def corrupt(self, tokens_L: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut spans out of tokens: returns input and target, which together have each token once."""
        end = [self.tokenizer.eos_token_id]
        if len(tokens_L) < 2:
            return np.concatenate([tokens_L, end]), np.array(end)
        inputs, targets, spans = self.lengths(len(tokens_L))
        seed = splitmix64(np.array([draw % 2**64], np.uint64))
        kept = cuts(inputs - spans - 1, spans, seed)
        gone = cuts(targets - spans - 1, spans, splitmix64(seed))
        bounds = np.cumsum(np.stack([kept, gone], axis=1).ravel())[:-1]
        pieces = np.split(tokens_L, bounds)  # one that stays, one that goes, and so on
        sentinels = np.array(self.sentinels()[:spans])[:, None]
        stay = [part for pair in zip(pieces[::2], sentinels) for part in pair]
        go = [part for pair in zip(sentinels, pieces[1::2]) for part in pair]
        return np.concatenate([*stay, end]), np.concatenate([*go, end])

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Corrupt each sample by its draw; the decoder reads the target one place later."""
        raw = self.raw_length()
        pairs = [self.corrupt(sample["tokens"][:raw], int(sample.get("draw", 0))) for sample in samples]
        ids_BL, mask_BL = pad_rows([inputs for inputs, _ in pairs], self.tokenizer.pad_token_id)
        targets_BL, _ = pad_rows([targets for _, targets in pairs], IGNORED)
        count = int((targets_BL != IGNORED).sum())
        shifted_BL = F.pad(targets_BL[:, :-1], (1, 0), value=IGNORED)
        inputs = {
            "input_ids": ids_BL,
            "attention_mask": mask_BL,
            "decoder_input_ids": shifted_BL.masked_fill(shifted_BL == IGNORED, self.tokenizer.pad_token_id),
        }
        return Batch(inputs, targets_BL, count=count, tokens=int(mask_BL.sum()) + count)

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Fill the sentinels of each {"text", "max_tokens"} greedily, or judge each {"tokens", "targets"}; alone."""
        return [
            self._judge(model, request) if "targets" in request else self._fill(model, request) for request in requests
        ]

    def _fill(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        ids = self.tokenizer(request["text"], add_special_tokens=False)["input_ids"]
        ids_BL = torch.tensor([[*ids, self.tokenizer.eos_token_id]], device=next(model.parameters()).device)
        output = model.generate(  # type: ignore[operator]
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            max_new_tokens=request.get("max_tokens", 32),
            do_sample=False,
        )
        found = output[0, 1:].tolist()
        sentinels = set(self.sentinels())
        spans: dict[int, list[int]] = {}
        for token in found:
            if token in sentinels:
                spans[token] = last = []
            elif token == self.tokenizer.eos_token_id:
                break
            elif spans:
                last.append(token)
        filled = [part for token in ids for part in (spans.get(token, []) if token in sentinels else [token])]
        return {"text": self.tokenizer.decode(filled, skip_special_tokens=True), "tokens": found}

    def _judge(self, model: nn.Module, request: dict[str, Any]) -> dict[str, Any]:
        """Give the log-probability, in nats, of each token of the target."""
        device = next(model.parameters()).device
        ids_BL, targets_L = torch.tensor([request["tokens"]], device=device), torch.tensor(request["targets"])
        before_BL = F.pad(targets_L[None, :-1], (1, 0), value=self.tokenizer.pad_token_id).to(device)
        logits_LV = model(input_ids=ids_BL, decoder_input_ids=before_BL, use_cache=False).logits[0].float().cpu()
        return {"logprobs": logits_LV.log_softmax(1).gather(1, targets_L[:, None])[:, 0].tolist()}

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take the first tokens of three documents, with spans cut out of them."""
        starts = [split.document(i)[:24].astype(np.int64) for i in range(min(3, split.rows))]
        pairs = [self.corrupt(ids, 0) for ids in starts if len(ids) > 2]
        return [{"tokens": inputs.tolist(), "targets": targets.tolist()} for inputs, targets in pairs]


def cuts(items: int, segments: int, seed: np.ndarray) -> np.ndarray:
    """Cut so many items into so many segments of one or more, each way equally likely: their lengths, int64 [segments]."""
    ranks = splitmix64(seed ^ np.arange(items - 1, dtype=np.uint64))
    ends = np.sort(ranks.argsort(kind="stable")[: segments - 1]) + 1
    return np.diff(np.concatenate([[0], ends, [items]]))

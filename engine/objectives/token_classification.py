"""Classify each word of a text: named entities, parts of speech. Shapes: B batch, L length, C classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.data.kinds.token_labels import NO_LABEL, TokenLabeledRows, first_tokens, join_words
from engine.data.shards import Split
from engine.errors import UserError
from engine.objectives import contract
from engine.objectives.contract import Batch, Loss, Samples, Scores, pad_rows

WORD = re.compile(r"\w+|[^\w\s]")  # of a text whose words aren't given: letters and digits, or one punctuation mark


class TokenClassification(contract.Objective):
    """One label a word, at its first token; cross-entropy over the classes.

    Labels with the prefixes of IOB2 or IOBES (B-PER, I-PER, O) name entities of several words; any other label is an
    entity of one word.
    """

    data_kind = "token_labels"
    auto_class = "AutoModelForTokenClassification"
    architectures = ("ForTokenClassification",)
    metric = "entity_f1"
    mode = "max"
    pipeline_tag = "token-classification"
    intended_use = "labeling the words of texts like its training data"
    servable = False
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"

    def model_options(self) -> dict[str, Any]:
        """Size the head for the labels, and store their names in the model's config."""
        if len(self.labels) < 2:
            raise UserError(
                f"token_classification needs two labels or more, the data has {len(self.labels)}: check data.label_column"
            )
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def samples(self, split: Split) -> Samples:
        """Return the rows with their labels, truncated to sequence_length tokens."""
        return TokenLabeledRows(split, self.sequence_length)

    def relabel(self, sample: dict[str, Any], class_ids: np.ndarray) -> dict[str, Any]:
        """Replace the labels of a sample by the model's classes."""
        labels = sample["labels"]
        return sample | {"labels": np.where(labels == NO_LABEL, NO_LABEL, class_ids[np.maximum(labels, 0)])}

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Tokenize {"words": [...]} or {"text": ...} and map the labels, where there are, to their indices.

        The sample also has the text, the "spans" of its words and the first token of each, None beyond sequence_length.
        """
        if "words" in example:
            text, spans = join_words(example["words"])
        else:
            text = example["text"]
            spans = [match.span() for match in WORD.finditer(text)]
        encoding = self.tokenizer(text, truncation=True, max_length=self.sequence_length, return_offsets_mapping=True)
        tokens = np.asarray(encoding["input_ids"] or [self.tokenizer.eos_token_id], dtype=np.int64)
        firsts = first_tokens(np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2), spans)
        labels = np.full(len(tokens), NO_LABEL, np.int64)
        for token, label in zip(firsts, example.get("labels") or [], strict=False):
            if token is not None and label is not None:
                labels[token] = self.labels.index(label)
        return {"tokens": tokens, "labels": labels, "text": text, "spans": spans, "first_tokens": firsts}

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Pad on the right."""
        ids_BL, mask_BL = pad_rows([sample["tokens"] for sample in samples], self.tokenizer.pad_token_id)
        targets_BL, _ = pad_rows([sample["labels"] for sample in samples], NO_LABEL)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        return Batch(inputs, targets_BL, count=int((targets_BL != NO_LABEL).sum()), tokens=int(mask_BL.sum()))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the cross-entropy, in nats, over the labeled tokens."""
        logits_BLC = model(**batch.inputs).logits.float()
        total = F.cross_entropy(
            logits_BLC.flatten(0, 1), batch.targets.flatten(), ignore_index=NO_LABEL, reduction="sum"
        )
        return Loss(total, batch.count)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return each row's summed negative log-likelihood in nats and its counts of words, correct words and entities."""
        logits_BLC = model(**batch.inputs).logits.float()
        nll_BL = F.cross_entropy(logits_BLC.mT, batch.targets, ignore_index=NO_LABEL, reduction="none")
        predicted_BL, targets_BL = logits_BLC.argmax(2).cpu().numpy(), batch.targets.cpu().numpy()
        is_word_BL = targets_BL != NO_LABEL
        entities = [
            (self._entities(targets[is_word]), self._entities(predicted[is_word]))
            for targets, predicted, is_word in zip(targets_BL, predicted_BL, is_word_BL, strict=True)
        ]
        return {
            "nll": nll_BL.sum(1).double().cpu().numpy(),
            "words": is_word_BL.sum(1),
            "correct": ((predicted_BL == targets_BL) & is_word_BL).sum(1),
            "entities": np.array([len(true) for true, _ in entities]),
            "predicted_entities": np.array([len(predicted) for _, predicted in entities]),
            "correct_entities": np.array([len(true & predicted) for true, predicted in entities]),
        }

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Return precision, recall and F1 of entities (micro average), the accuracy of words and the loss in nats a word."""
        words, correct = max(int(scores["words"].sum()), 1), int(scores["correct_entities"].sum())
        true, predicted = int(scores["entities"].sum()), int(scores["predicted_entities"].sum())
        return {
            "entity_f1": 2 * correct / max(true + predicted, 1),
            "entity_precision": correct / max(predicted, 1),
            "entity_recall": correct / max(true, 1),
            "accuracy": float(scores["correct"].sum()) / words,
            "loss": float(scores["nll"].sum()) / words,
        }

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Label the words of each {"words"} or {"text"}: label, probability and character span of each.

        Words beyond sequence_length are left out.
        """
        samples = [self.prepare(request) for request in requests]
        batch = self.collate(samples).to(next(model.parameters()).device)
        probabilities_BLC = model(**batch.inputs).logits.float().softmax(2).cpu()
        scores_BL, classes_BL = (tensor.tolist() for tensor in probabilities_BLC.max(2))
        return [
            {
                "words": [
                    {"word": sample["text"][start:stop], "label": self.labels[classes[token]], "score": scores[token], "start": start, "end": stop}
                    for (start, stop), token in zip(sample["spans"], sample["first_tokens"], strict=True)
                    if token is not None
                ]
            }
            for sample, classes, scores in zip(samples, classes_BL, scores_BL, strict=True)
        ]  # fmt: skip

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Return three rows as text."""
        rows = [split.document(i).tolist()[:64] for i in range(min(3, split.num_rows))]
        return [{"text": self.tokenizer.decode(row, skip_special_tokens=True)} for row in rows]

    def _entities(self, class_ids: np.ndarray) -> set[tuple[int, int, str]]:
        return entities_of([self.labels[i] for i in class_ids.tolist()])


def entities_of(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return the entities (first word, last word + 1, type) of a row's labels, as conlleval and seqeval count them.

    Tjong Kim Sang & De Meulder 2003, "Introduction to the CoNLL-2003 shared task": https://aclanthology.org/W03-0419.
    """
    entities: set[tuple[int, int, str]] = set()
    first, current = -1, ""  # of the entity that is open; -1: none is
    for i, label in enumerate([*labels, "O"]):
        prefix, separator, name = label.partition("-")
        if not separator:
            prefix, name = ("O", "") if label == "O" else ("S", label)
        if first >= 0 and not (prefix in ("I", "E") and name == current):
            entities.add((first, i, current))
            first = -1
        if first < 0 and prefix != "O":
            first, current = i, name
        if first >= 0 and prefix in ("E", "S"):
            entities.add((first, i + 1, current))
            first = -1
    return entities

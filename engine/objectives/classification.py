"""Text classification. Shapes: B batch, L length, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine.data.kinds.labeled_text import LabeledRows
from engine.data.shards import Split
from engine.errors import UserError
from engine.objectives import contract
from engine.objectives.contract import Batch, Loss, Samples, Scores, pad_rows


class SequenceClassification(contract.Objective):
    """One label per row, cross-entropy over the classes."""

    data_kind = "labelled"
    auto_class = "AutoModelForSequenceClassification"
    architectures = ("ForSequenceClassification",)
    metric = "accuracy"
    mode = "max"
    pipeline_tag = "text-classification"
    intended_use = "classifying texts into the labels below"
    endpoint_task: ClassVar[str | None] = "classification"
    can_embed = True
    is_classifier = True
    evaluation_metrics = ("accuracy", "macro_f1", "weighted_f1", "matthews", "calibration_error")
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"

    def model_options(self) -> dict[str, Any]:
        """Size the head for the labels, and store their names in the model's config."""
        if len(self.labels) < 2:
            raise UserError(
                f"classification needs two labels or more, the data has {len(self.labels)}: check data.label_column"
            )
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def samples(self, split: Split) -> Samples:
        """Return the labeled rows, truncated to sequence_length tokens."""
        return LabeledRows(split, self.sequence_length)

    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Tokenize a text and map its label, if it has one, to its index."""
        ids = self.tokenizer(example["text"], truncation=True, max_length=self.sequence_length)["input_ids"]
        label = example.get("label")
        return {
            "tokens": np.asarray(ids or [self.tokenizer.eos_token_id], dtype=np.int64),
            "label": self.labels.index(label) if label is not None else 0,
        }

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Pad on the right."""
        ids_BL, mask_BL = pad_rows([sample["tokens"] for sample in samples], self.tokenizer.pad_token_id)
        labels_B = torch.tensor([int(sample["label"]) for sample in samples])
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
        return Batch(inputs, labels_B, count=len(samples), tokens=int(mask_BL.sum()))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the cross-entropy, in nats, over the rows."""
        logits_BC = model(**batch.inputs).logits.float()
        return Loss(F.cross_entropy(logits_BC, batch.targets, reduction="sum"), batch.count)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return each row's negative log-likelihood in nats, its label, the predicted class and the probability of that."""
        logits_BC = model(**batch.inputs).logits.float()
        return {
            "nll": F.cross_entropy(logits_BC, batch.targets, reduction="none").double().cpu().numpy(),
            "label": batch.targets.cpu().numpy(),
            "predicted": logits_BC.argmax(1).cpu().numpy(),
            "confidence": logits_BC.softmax(1).amax(1).cpu().numpy(),
        }

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Return the accuracy and the mean loss."""
        return {
            "accuracy": float((scores["label"] == scores["predicted"]).mean()),
            "loss": float(scores["nll"].mean()),
        }

    @torch.no_grad()
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Classify each {"text"}: return its label and the probability of each class."""
        batch = self.collate([self.prepare(request) for request in requests]).to(next(model.parameters()).device)
        probabilities_BC = model(**batch.inputs).logits.float().softmax(1).cpu()
        return [
            {"label": self.labels[int(row_C.argmax())], "scores": dict(zip(self.labels, row_C.tolist(), strict=True))}
            for row_C in probabilities_BC
        ]

    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Take the texts of three rows."""
        texts = [self.tokenizer.decode(split.document(i).tolist()[:64]) for i in range(min(3, split.num_rows))]
        return [{"text": text} for text in texts]

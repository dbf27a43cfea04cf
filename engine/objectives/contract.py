"""What every family of models shares: from an example to a batch, a summed loss, metrics and a prediction.

A new family or task is one file beside this one, named as in `objective.name`, with a class `Objective`; plus a YAML in
conf/objective, one in conf/model and a test. Shapes: B batch, L length, V vocabulary, C classes.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import ObjectiveConfig
from engine.data.packing import Packing
from engine.data.shards import Split
from engine.errors import UserError, nearest

Scores = dict[str, np.ndarray]  # per example: name -> array [examples]


class Samples(Protocol):
    """Training samples by number."""

    def __len__(self) -> int:
        """Count them."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return sample i, its arrays by name."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: the model's keyword arguments, what they should give, and how many terms the loss sums."""

    inputs: dict[str, Tensor]
    targets: Tensor
    count: int  # terms in the summed loss: tokens or examples
    tokens: int  # tokens that the model reads, padding left out

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            targets=self.targets.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Loss:
    """A sum and the count of its terms; never a mean. The one division happens over the global batch."""

    sum: Tensor
    count: int


class Objective(ABC):
    """One task, from example to prediction."""

    auto_class: ClassVar[str]  # the transformers Auto class that loads its models
    metric: ClassVar[str]  # what sweeps and comparisons look at
    mode: ClassVar[str]  # "min" or "max" of that metric
    over_vocabulary: ClassVar[bool] = False  # whether its models give logits over the vocabulary at every token

    def __init__(
        self,
        options: ObjectiveConfig,
        tokenizer: Any,
        sequence_length: int,
        labels: Sequence[str] = (),
        packing: Packing | None = None,
    ) -> None:
        """Take the tokenizer (transformers), the longest sample in tokens, the names of the classes, if any, and the packing."""
        self.options = options
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.labels = list(labels)
        self.packing = packing or Packing()

    def model_options(self) -> dict[str, Any]:
        """Return what the task asks of the transformers config (the number of labels, say)."""
        return {}

    @abstractmethod
    def samples(self, split: Split) -> Samples:
        """Return the training samples of a split: packed blocks, or rows."""

    @abstractmethod
    def prepare(self, example: dict[str, Any]) -> dict[str, Any]:
        """Turn one raw example ({"text": ..., "label": ...}) into a sample as `samples` gives them."""

    @abstractmethod
    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Put samples together as one micro-batch.

        Each has a "draw" beside its arrays: an integer that seeds what the task chooses at random. It is another one each
        time that training shows the sample, always the same in an evaluation, and in neither depends on the layout.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the summed loss of a micro-batch and the count of its terms."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return what the metrics need of each example of a batch: arrays of the batch's length."""

    @abstractmethod
    def summarize(self, scores: Scores) -> dict[str, float]:
        """Turn the examples' scores into metrics. Used on resamples too, so it costs microseconds."""

    @abstractmethod
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer requests together."""

    @abstractmethod
    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Return a few requests from held-out data whose answers a bundle records and a replica replays."""

    @torch.no_grad()
    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the metrics of a model over some batches."""
        return self.summarize(join_scores(self.score(model, batch) for batch in batches))


def join_scores(parts: Iterable[Scores]) -> Scores:
    """Lay the scores of several batches end to end."""
    collected = list(parts)
    return {name: np.concatenate([part[name] for part in collected]) for name in collected[0]}


def objective_class(name: str) -> type[Objective]:
    """Return the class `Objective` of engine/objectives/<name>.py. Raises UserError for a name without a file."""
    import engine.objectives as package

    known = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "contract")
    if name not in known:
        raise UserError(f"objective.name={name} is not one of {', '.join(known)}{nearest(name, known)}")
    found: type[Objective] = importlib.import_module(f"engine.objectives.{name}").Objective
    return found


def pad_rows(rows: Sequence[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad token rows on the right: ids_BL int64 and mask_BL int64 (1 where a token is)."""
    length = max(len(row) for row in rows)
    ids_BL = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask_BL = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_BL[i, : len(row)] = torch.as_tensor(row)
        mask_BL[i, : len(row)] = 1
    return ids_BL, mask_BL


def document_places(rows: Sequence[np.ndarray], lengths: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Return each place's position in its own document and that document's number in its row: int64 [B, width] both.

    `rows` holds where the documents of each row begin, `lengths` how long the rows are; padding counts as a document.
    """
    position_BL = torch.empty((len(rows), width), dtype=torch.int64)
    document_BL = torch.empty((len(rows), width), dtype=torch.int64)
    for i, (starts, length) in enumerate(zip(rows, lengths, strict=True)):
        begins = np.zeros(width, np.int64)
        begins[[*starts[starts < width], *([length] if length < width else [])]] = 1
        number = np.cumsum(begins) - 1
        position_BL[i] = torch.as_tensor(np.arange(width) - np.flatnonzero(begins)[number])
        document_BL[i] = torch.as_tensor(number)
    return position_BL, document_BL

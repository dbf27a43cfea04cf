"""What every family of models shares: from an example to a batch, a summed loss, metrics and a prediction.

A new family or task is one file beside this one, named as in `objective.name`, with a class `Objective`; plus a YAML in
conf/objective, one in conf/model and a test. Shapes: B batch, L length, V vocabulary, C classes.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import DataConfig, ObjectiveConfig, data_kind
from engine.data.packing import Packing
from engine.data.shards import Split
from engine.errors import UserError, nearest
from engine.models.cross_entropy import IGNORED, summed_cross_entropy, token_scores
from engine.models.size import Stack, flops_per_token

Scores = dict[str, np.ndarray]  # per example: name -> array [examples, ...]


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


class Ranks(Protocol):
    """The ranks of a run, of which this process is one."""

    rank: int

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return every rank's rows, [n, ...] with an n of its own, in the order of the ranks."""


class Objective(ABC):
    """One task, from example to prediction."""

    data_kind: ClassVar[str] = "text"  # the kind of prepared data, as `data_kind` of engine/config calls it
    auto_class: ClassVar[str]  # the transformers Auto class that loads its models, or "diffusers.CLASS"
    architectures: ClassVar[tuple[str, ...]]  # how the names of their classes end
    metric: ClassVar[str]  # what sweeps and comparisons look at
    mode: ClassVar[str]  # "min" or "max" of that metric
    servable: ClassVar[bool] = True  # whether the endpoint answers for its models
    over_vocabulary: ClassVar[bool] = False  # whether its models give logits over the vocabulary at every token
    divisible: ClassVar[bool] = False  # whether ranks may share a sequence: each token's loss and scores add up
    needs: ClassVar[tuple[str, ...]] = ()  # packages that its models need beside transformers

    def __init__(
        self,
        options: ObjectiveConfig,
        processor: Any,
        sequence_length: int,
        labels: Sequence[str] = (),
        packing: Packing | None = None,
    ) -> None:
        """Take the processor, the longest sample in tokens, the names of the classes, if any, and the packing.

        The processor is transformers': a tokenizer, an image processor, or one that holds a tokenizer and what reads images or sounds.
        """
        self.options = options
        self.processor = processor
        self.sequence_length = sequence_length
        self.labels = list(labels)
        self.packing = packing or Packing()

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or the processor itself."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def image_processor(self) -> Any:
        """The processor's image processor, or the processor itself."""
        return getattr(self.processor, "image_processor", self.processor)

    def model_options(self) -> dict[str, Any]:
        """Return what the task asks of the transformers config (the number of labels, say)."""
        return {}

    def bind_model(self, config: Any) -> None:  # noqa: B027 - nothing is a fair answer
        """Take note of the model's transformers config, before the first batch; most tasks need nothing of it."""

    def save(self, folder: Path) -> None:
        """Write into a bundle's folder what a model of this task needs beside its weights."""
        self.processor.save_pretrained(folder)

    def stacks(self, config: Any) -> list[Stack]:
        """Return the stacks of blocks of a model with this transformers config, and a full sample's tokens in each."""
        return [Stack(config, self.sequence_length)]

    def predicted(self, tokens: int) -> int:
        """Return of how many of a full sample's `tokens` the loss asks logits over the vocabulary."""
        return tokens if self.over_vocabulary else 0

    def flops(self, model: nn.Module) -> float:
        """Return the floating-point operations of a full sample, forward and backward."""
        (stack,) = self.stacks(model.config)
        return stack.tokens * flops_per_token(model, stack.config, stack.tokens)

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

    def before_step(
        self, model: nn.Module, batches: list[tuple[Batch, float]], ranks: Ranks
    ) -> list[tuple[Batch, float]]:
        """Return this rank's weighted micro-batches of a step with what their losses need to know of the global batch.

        Most losses need nothing. All ranks call it, once a step, with equally many micro-batches.
        """
        return batches

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the summed loss of a micro-batch and the count of its terms."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return what the metrics need of each example of a batch: arrays of the batch's length."""

    def complete(self, scores: Scores) -> Scores:
        """Add, or put in place, what can be told of an example only once all of them have been scored."""
        return scores

    @abstractmethod
    def summarize(self, scores: Scores) -> dict[str, float]:
        """Turn the examples' scores into metrics. Used on resamples too, so it costs microseconds."""

    @abstractmethod
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer requests together."""

    def check_request(self, request: dict[str, Any]) -> None:  # noqa: B027 - most requests are checked where they come in
        """Raise UserError for a request that `predict` cannot answer."""

    def image_facts(self, config: Any) -> dict[str, int]:
        """Return the side in pixels and the tokens of an image that a model of this config makes; empty where it makes none.

        One that does answers {"prompt", "seed"} with {"image": a PNG file in base64}.
        """
        return {}

    @abstractmethod
    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Return a few requests from held-out data whose answers a bundle records and a replica replays."""

    @torch.no_grad()
    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the metrics of a model over some batches."""
        return self.summarize(self.complete(join_scores(self.score(model, batch) for batch in batches)))


class OverVocabulary(Objective):
    """A task whose model gives logits over the vocabulary, and whose targets are tokens: IGNORED where there is none."""

    metric = "loss"
    mode = "min"
    over_vocabulary = True
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}  # to the model, beside a batch's inputs

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the cross-entropy, in nats, over the targets."""
        inputs, options = {**batch.inputs, **self.forward_options}, self.options
        total = summed_cross_entropy(model, inputs, batch.targets, batch.count, options.z_loss, options.logits_chunk)
        return Loss(total, batch.count)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Give each example's summed negative log-likelihood in nats, its targets, and those that were likeliest."""
        inputs = {**batch.inputs, **self.forward_options}
        nll_BL, found_BL = token_scores(model, inputs, batch.targets, self.options.logits_chunk)
        return {
            "nll": nll_BL.sum(1).double().cpu().numpy(),
            "tokens": (batch.targets != IGNORED).sum(1).cpu().numpy(),
            "found": found_BL.sum(1).cpu().numpy(),
        }

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Give the loss in nats a target and the perplexity, its exponential."""
        loss = float(scores["nll"].sum()) / float(scores["tokens"].sum())
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def join_scores(parts: Iterable[Scores]) -> Scores:
    """Lay the scores of several batches end to end."""
    collected = list(parts)
    return {name: np.concatenate([part[name] for part in collected]) for name in collected[0]}


KINDS = {  # kind of prepared data -> what it is, and how it comes about
    "text": ("text without labels", "leave out data.label_column and data.image_column, or use data=python_stdlib"),
    "labelled": ("texts with labels", "say which column holds the labels with data.label_column=..."),
    "images": ("images with labels", "say which columns hold them with data.image_column=... and data.label_column=..."),
    "speech": ("speech with its words", "say which column holds the sounds with data.audio_column=..., and which their words with data.text_column=..."),
    "captioned": ("images with captions", "say which column holds the images with data.image_column=..., and what their captions are with data.caption='a photo of a {label}' or '{COLUMN}'"),
}  # fmt: skip


def check_data(task: str, data: DataConfig, whose: str = "objective") -> None:
    """Raise UserError, before anything is prepared, where data options aren't for a task; `whose` is it: a bundle's name, say."""
    wanted, given = objective_class(task).data_kind, data_kind(data)
    if wanted != given:
        raise UserError(
            f"{whose} is for {task}, which reads {KINDS[wanted][0]}, and the data are {KINDS[given][0]}: {KINDS[wanted][1]}"
        )


def objective_names() -> list[str]:
    """Return the names of all tasks."""
    import engine.objectives as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "contract")


def objective_for(architecture: str) -> str | None:
    """Return the task that a transformers class (its name) is for; of several, the one that names it most closely."""
    found = [
        (len(ending), name)
        for name in objective_names()
        for ending in objective_class(name).architectures
        if architecture.endswith(ending)
    ]
    return max(found)[1] if found else None


def objective_class(name: str) -> type[Objective]:
    """Return the task's class, the one that engine/objectives/<name>.py defines. Raises UserError for a name without a file."""
    known = objective_names()
    if name not in known:
        raise UserError(f"objective.name={name} is not one of {', '.join(known)}{nearest(name, known)}")
    module = importlib.import_module(f"engine.objectives.{name}")
    (found,) = (
        it for it in vars(module).values()
        if isinstance(it, type) and issubclass(it, Objective) and it.__module__ == module.__name__
    )  # fmt: skip
    return found


def pad_rows(rows: Sequence[np.ndarray], pad_id: int, width: int = 0) -> tuple[Tensor, Tensor]:
    """Pad token rows on the right, to `width` tokens at least: ids_BL int64 and mask_BL int64 (1 where a token is)."""
    length = max(width, *(len(row) for row in rows))
    ids_BL = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask_BL = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_BL[i, : len(row)] = torch.as_tensor(row)
        mask_BL[i, : len(row)] = 1
    return ids_BL, mask_BL

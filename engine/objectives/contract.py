"""What every family of models shares: from an example to a batch, a summed loss, metrics and a prediction.

A new task is one file beside this one, named as `objective.name`, with one subclass of `Objective`; plus a YAML in
conf/objective, a recipe in conf/experiment and a test. A task on a new kind of data adds one file in engine/data/kinds. Shapes: B batch, L length, V vocabulary, C classes.
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

from engine.config import DataConfig, ObjectiveConfig
from engine.data.kinds import kind_class, matching_kinds
from engine.data.packing import Packing
from engine.data.shards import Split
from engine.errors import UserError, did_you_mean
from engine.models.cross_entropy import IGNORE_INDEX, summed_cross_entropy, token_scores
from engine.models.size import TransformerStack, flops_per_token

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

    data_kind: ClassVar[str] = "text"  # name of the `DataKind` that it reads (engine/data/kinds)
    auto_class: ClassVar[str]  # the transformers Auto class that loads its models, or "diffusers.CLASS"
    architectures: ClassVar[tuple[str, ...]]  # how the names of their classes end
    metric: ClassVar[str]  # what sweeps and comparisons look at
    mode: ClassVar[str]  # "min" or "max" of that metric
    servable: ClassVar[bool] = True  # whether the endpoint answers for its models
    is_causal: ClassVar[bool] = (
        False  # an autoregressive language model: attention is causal, and it can continue a text
    )
    is_classifier: ClassVar[bool] = False  # `score` returns label, predicted and confidence of each example
    has_lm_head: ClassVar[bool] = False  # the model returns logits over the vocabulary at every token
    supports_packing: ClassVar[bool] = False  # data.packing and data.within_documents apply
    supports_sequence_parallel: ClassVar[bool] = (
        False  # ranks may share a sequence: loss and scores are sums over tokens
    )
    evaluation_metrics: ClassVar[tuple[str, ...]] = ()  # of engine/evaluate/metrics.py, beside those of `summarize`
    peft_task_type: ClassVar[str | None] = None  # task_type in the adapter_config.json of a LoRA adapter
    required_packages: ClassVar[tuple[str, ...]] = ()  # packages that its models need in addition to transformers

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

    def transformer_stacks(self, config: Any) -> list[TransformerStack]:
        """Return the transformer stacks of a model with this config, each with the tokens of a full sample in it."""
        return [TransformerStack(config, self.sequence_length)]

    def num_target_tokens(self, num_tokens: int) -> int:
        """Return how many of a full sample's `num_tokens` tokens need logits over the vocabulary for the loss."""
        return num_tokens if self.has_lm_head else 0

    def flops(self, model: nn.Module) -> float:
        """Return the floating-point operations of a full sample, forward and backward."""
        (stack,) = self.transformer_stacks(model.config)
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

    def finalize_scores(self, scores: Scores) -> Scores:
        """Add or replace the scores of an example that depend on all other examples."""
        return scores

    @abstractmethod
    def summarize(self, scores: Scores) -> dict[str, float]:
        """Turn the examples' scores into metrics. Used on resamples too, so it costs microseconds."""

    @abstractmethod
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer requests together."""

    def check_request(self, request: dict[str, Any]) -> None:  # noqa: B027 - most requests are checked where they come in
        """Raise UserError for a request that `predict` cannot answer."""

    def image_output_size(self, config: Any) -> dict[str, int]:
        """Return the side in pixels and the tokens of an image that a model with this config generates; empty if it generates none.

        A model that does answers {"prompt", "seed"} with {"image": a PNG file in base64}.
        """
        return {}

    @abstractmethod
    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Return a few requests from held-out data whose answers a bundle records and a replica replays."""

    @torch.no_grad()
    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the metrics of a model over some batches."""
        return self.summarize(self.finalize_scores(concat_scores(self.score(model, batch) for batch in batches)))


class LMHeadObjective(Objective):
    """A task whose model has a language-model head; the targets are tokens, or IGNORE_INDEX where there is none."""

    metric = "loss"
    mode = "min"
    has_lm_head = True
    forward_options: ClassVar[dict[str, Any]] = {"use_cache": False}  # passed to the model with a batch's inputs

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the cross-entropy, in nats, over the targets."""
        inputs, options = {**batch.inputs, **self.forward_options}, self.options
        total = summed_cross_entropy(model, inputs, batch.targets, batch.count, options.z_loss, options.logits_chunk)
        return Loss(total, batch.count)

    @torch.no_grad()
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return each example's summed negative log-likelihood in nats, its target tokens, and how many have the highest logit."""
        inputs = {**batch.inputs, **self.forward_options}
        nll_BL, correct_BL = token_scores(model, inputs, batch.targets, self.options.logits_chunk)
        return {
            "nll": nll_BL.sum(1).double().cpu().numpy(),
            "tokens": (batch.targets != IGNORE_INDEX).sum(1).cpu().numpy(),
            "correct": correct_BL.sum(1).cpu().numpy(),
        }

    def summarize(self, scores: Scores) -> dict[str, float]:
        """Return the loss in nats per target token and its exponential, the perplexity."""
        loss = float(scores["nll"].sum()) / float(scores["tokens"].sum())
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def concat_scores(parts: Iterable[Scores]) -> Scores:
    """Concatenate the scores of several batches."""
    batches = list(parts)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def check_data(task: str, data: DataConfig, whose: str = "objective") -> None:
    """Raise UserError, before anything is prepared, where data options aren't for a task; `whose`: its owner, a bundle's name say."""
    wanted, given = kind_class(objective_class(task).data_kind), matching_kinds(data)
    if not any(isinstance(kind, wanted) and kind.name == wanted.name for kind in given):
        raise UserError(
            f"{whose} is for {task}, which reads {wanted.description}, and the data are "
            f"{' or '.join(kind.description for kind in given)}: {wanted.hint}"
        )


def objective_names() -> list[str]:
    """Return the names of all tasks."""
    import engine.objectives as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "contract")


def objective_for_architecture(architecture: str) -> str | None:
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
        raise UserError(f"objective.name={name} is not one of {', '.join(known)}{did_you_mean(name, known)}")
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

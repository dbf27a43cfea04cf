"""The interface of an objective: from an example to a batch, a summed loss, metrics and a prediction.

A new objective is one file in this folder, named as `objective.name`, with one subclass of `Objective`; plus a YAML in
conf/objective, a recipe in conf/experiment and a test. One on a new kind of data adds one file in engine/data/kinds.
Shapes: B batch, L length, V vocabulary, C classes.
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
from engine.data.kinds import DataKind, kind_class, matching_kinds
from engine.data.packing import Packing
from engine.data.shards import Split
from engine.errors import UserError, did_you_mean
from engine.models.cross_entropy import IGNORE_INDEX, summed_cross_entropy, token_scores
from engine.models.size import TransformerStack, flops_per_token

Scores = dict[str, np.ndarray]  # per example: name -> array [examples, ...]


class Samples(Protocol):
    """Indexed samples."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return the arrays of sample i by name."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: the model's keyword arguments, the targets, and the number of terms in the summed loss."""

    inputs: dict[str, Tensor]
    targets: Tensor
    count: int  # terms in the summed loss: tokens or examples
    tokens: int  # tokens that the model reads, without padding

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            targets=self.targets.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Loss:
    """A sum and the count of its terms, never a mean: the only division is over the global batch."""

    sum: Tensor
    count: int


class ProcessGroup(Protocol):
    """The part of a run's process group that objectives use."""

    rank: int

    def all_gather_rows(self, rows: Tensor) -> list[Tensor]:
        """All-gather rows, [n, ...] with another n on each rank; return those of each rank, in rank order."""


class Objective(ABC):
    """A task, from example to prediction."""

    data_kind: ClassVar[str] = "text"  # name of the `DataKind` that it reads (engine/data/kinds)
    auto_class: ClassVar[str]  # the transformers Auto class that loads its models, or "diffusers.CLASS"
    architectures: ClassVar[tuple[str, ...]]  # suffixes of the class names of its models
    metric: ClassVar[str]  # that sweeps and comparisons use
    mode: ClassVar[str]  # "min" or "max" of that metric
    pipeline_tag: ClassVar[str | None] = None  # Hugging Face's name of the task, in the model card
    intended_use: ClassVar[str] = ""  # default in the model card, after "For "; empty: its task
    servable: ClassVar[bool] = True  # whether the endpoint serves its models
    endpoint_task: ClassVar[str | None] = None  # the endpoint's name of the task; None: the objective's name
    can_embed: ClassVar[bool] = False  # the endpoint can return mean last hidden states of a text
    is_causal: ClassVar[bool] = False  # an autoregressive language model, with causal attention
    is_classifier: ClassVar[bool] = False  # `score` returns label, predicted and confidence of each example
    has_lm_head: ClassVar[bool] = False  # the model returns logits over the vocabulary at every token
    supports_packing: ClassVar[bool] = False  # data.packing and data.within_documents apply
    supports_sequence_parallel: ClassVar[bool] = False  # loss and scores are sums over tokens, which ranks may share
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
        """Take the processor, the maximum tokens of a sample, the names of the classes, if any, and the packing.

        The processor is one of transformers: a tokenizer, an image processor, or a processor that holds a tokenizer and an
        image processor or feature extractor.
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

    @property
    def kind(self) -> type[DataKind]:
        """The kind of data that it reads."""
        return kind_class(self.data_kind)

    def relabel(self, sample: dict[str, Any], class_ids: np.ndarray) -> dict[str, Any]:
        """Replace a sample's label by the model's class; `class_ids` has it for each label of the data: int64 [labels]."""
        return sample | {"label": class_ids[sample["label"]]}

    def model_options(self) -> dict[str, Any]:
        """Return the fields of the model's config that the task determines, such as the number of labels."""
        return {}

    def bind_model(self, config: Any) -> None:  # noqa: B027 - most tasks need nothing
        """Read what the task needs from the model's config, before the first batch. Raises UserError for an unsuitable model."""

    def save(self, folder: Path) -> None:
        """Write the files that inference needs in addition to the weights into a bundle's folder."""
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
        """Turn a raw example ({"text": ..., "label": ...}) into a sample as `samples` returns them."""

    @abstractmethod
    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """Collate samples into a micro-batch.

        A sample's "draw" is an integer that seeds the task's random choices. It differs in each epoch of training, is the same
        in each evaluation, and never depends on the layout.
        """

    def before_step(
        self, model: nn.Module, batches: list[tuple[Batch, float]], group: ProcessGroup
    ) -> list[tuple[Batch, float]]:
        """Add to this rank's weighted micro-batches of a step what their losses need from the global batch; mostly nothing.

        All ranks call it, once per step, with the same number of micro-batches.
        """
        return batches

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the summed loss of a micro-batch and the count of its terms."""

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Return the values of each example that the metrics need: arrays of the batch's length."""

    def finalize_scores(self, scores: Scores) -> Scores:
        """Add or replace the scores of an example that depend on all other examples."""
        return scores

    @abstractmethod
    def summarize(self, scores: Scores) -> dict[str, float]:
        """Compute metrics from the examples' scores. Bootstrap resamples call it too, so it must take microseconds."""

    @abstractmethod
    def predict(self, model: nn.Module, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer a batch of requests."""

    def check_request(self, request: dict[str, Any]) -> None:  # noqa: B027 - the API checks most requests
        """Raise UserError for a request that `predict` cannot answer."""

    def image_output_size(self, config: Any) -> dict[str, int]:
        """Return the side in pixels and the tokens of an image that a model with this config generates; empty if it generates none.

        A model that does answers {"prompt", "seed"} with {"image": a PNG file in base64}.
        """
        return {}

    @abstractmethod
    def golden_requests(self, split: Split) -> list[dict[str, Any]]:
        """Return a few requests from held-out data; a bundle records their outputs, and a replica checks that it reproduces them."""

    @torch.no_grad()
    def metrics(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the metrics of a model on some batches."""
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
    objective = objective_class(task)
    wanted, given = kind_class(objective.data_kind), matching_kinds(data)
    if not any(isinstance(kind, wanted) and kind.name == wanted.name for kind in given):
        raise UserError(
            f"{whose} is for {task}, which reads {wanted.description}, and the data are "
            f"{' or '.join(kind.description for kind in given)}: {wanted.hint}"
        )
    if (data.packing != "end_to_end" or data.within_documents) and not objective.supports_packing:
        supporting = " and ".join(objectives_with("supports_packing"))
        raise UserError(
            f"data.packing and data.within_documents are for objective={supporting}: leave them out for {task}"
        )


def objective_names() -> list[str]:
    """Return the names of all tasks."""
    import engine.objectives as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "contract")


def objectives_with(declaration: str) -> list[str]:
    """Return the names of the objectives that declare a capability, `supports_packing` say."""
    return [name for name in objective_names() if getattr(objective_class(name), declaration)]


def objective_for_architecture(architecture: str) -> str | None:
    """Return the task of a transformers class name; of several, the one with the longest matching suffix."""
    matches = [
        (len(suffix), name)
        for name in objective_names()
        for suffix in objective_class(name).architectures
        if architecture.endswith(suffix)
    ]
    return max(matches)[1] if matches else None


def objective_class(name: str) -> type[Objective]:
    """Return the class that engine/objectives/<name>.py defines. Raises UserError if there is no such file."""
    known = objective_names()
    if name not in known:
        raise UserError(f"objective.name={name} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    module = importlib.import_module(f"engine.objectives.{name}")
    (task,) = (
        member for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Objective) and member.__module__ == module.__name__
    )  # fmt: skip
    return task


def pad_rows(rows: Sequence[np.ndarray], pad_id: int, width: int = 0) -> tuple[Tensor, Tensor]:
    """Pad token rows on the right, to `width` tokens at least: ids_BL int64 and mask_BL int64 (1 at tokens)."""
    length = max(width, *(len(row) for row in rows))
    ids_BL = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask_BL = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_BL[i, : len(row)] = torch.as_tensor(row)
        mask_BL[i, : len(row)] = 1
    return ids_BL, mask_BL

"""A model under DeepSpeed ZeRO: the only module that imports DeepSpeed.

`Sharded` hides how a stage lays out fp32 master weights and AdamW moments: `fragments` yields each rank's own as flat
pieces with their offsets in the parameter, which is all that a layout-free checkpoint needs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from engine.config import Config

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names of the first and second moment
NO_CLIP = 1e30  # DeepSpeed reports a gradient norm only while it clips


@dataclass(frozen=True)
class Fragment:
    """A flat piece of a parameter that this rank owns: `tensors` are views, kind -> [numel], into live storage."""

    name: str
    shape: tuple[int, ...]
    start: int  # offset of the piece in the flattened parameter, in elements
    tensors: dict[str, Tensor]  # "weight" always; the moments where the parameter is trained


def deepspeed_config(config: Config, precision: str, parameters: int) -> dict[str, Any]:
    """Derive DeepSpeed's config. The loop owns accumulation and the mean over the global batch, so its own are off."""
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "overlap_comm": False,
        "reduce_bucket_size": min(int(5e8), parameters),  # DeepSpeed allots the whole bucket, a gigabyte by default
    }
    if config.zero.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.zero.offload_optimizer}
    if config.zero.offload_param != "none":
        zero["offload_param"] = {"device": config.zero.offload_param}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.clip or NO_CLIP,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trained parameters: matrices decay; biases and norms, being vectors, don't."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def import_deepspeed() -> Any:
    """Import DeepSpeed, quietly, and without the two thirds of its import that training never uses.

    Those are MLflow, for its autotuner, and Inductor, which its Muon asks for by `@torch.compile` as soon as any
    optimizer is checked.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with without_mlflow(), mock.patch("torch.compile", lambda function: function):
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Built by a compiler at start-up (20 s) and used in inference only: training's collectives are torch's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def without_mlflow() -> Iterator[None]:
    """Let `import mlflow` fail during a block, unless it was imported before."""
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's sign for "not to be found"
    try:
        yield
    finally:
        if absent:
            del sys.modules["mlflow"]


class Sharded:
    """A model, its gradients and its optimizer, spread over the workers by ZeRO."""

    def __init__(self, model: nn.Module, config: Config, world: int, precision: str) -> None:
        """Shard `model` (fp32, with equal weights on all ranks). The process group must be up."""
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # read by the CPU accelerator
        deepspeed = import_deepspeed()
        optimizer = torch.optim.AdamW(
            decay_groups(model, config.optim.weight_decay),
            lr=config.optim.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            eps=config.optim.eps,
            fused=True,
        )
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, precision, sum(p.numel() for p in model.parameters())),
            dist_init_required=False,
        )
        self.base = optimizer
        self.world = world
        self.stage = config.zero.stage
        self._max_norm = config.optim.clip or NO_CLIP
        self._discarding = False
        self._grad_norm = 0.0
        self.engine.clip_fp32_gradients = self._clip_fp32_gradients

    @property
    def module(self) -> nn.Module:
        """The transformers module."""
        module: nn.Module = self.engine.module
        return module

    def __call__(self, **inputs: Any) -> Any:
        """Run the model forward."""
        return self.engine(**inputs)

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self.engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, whose sum over all ranks and micro-batches is the global batch's mean loss."""
        self.engine.backward(loss * self.world, scale_wrt_gas=False)  # DeepSpeed divides by the world size

    def step(self, lr: float) -> float:
        """Clip, update the weights with learning rate `lr`, clear the gradients; return the norm before clipping.

        Where the norm is infinite or NaN, which it then is on all ranks, weights and moments stay as they are.
        """
        for group in self.base.param_groups:
            group["lr"] = lr
        self.engine.step()
        if not self.engine.was_step_applied():
            return math.inf
        return float(self.engine.get_global_grad_norm() or self._grad_norm)

    def discard(self) -> None:
        """Clear the gradients and leave weights and moments as they are: DeepSpeed's way with a norm that is no number."""
        from deepspeed.runtime import utils
        from deepspeed.runtime.zero import stage3, stage_1_and_2

        with contextlib.ExitStack() as stack:
            for module in (utils, stage_1_and_2, stage3):
                stack.enter_context(mock.patch.object(module, "is_invalid_grad_norm", return_value=True))
            self._discarding = True
            self.engine.step()
            self._discarding = False

    def copy_weights(self, weight: Callable[[str], Tensor]) -> None:
        """Overwrite the weights that the forward pass uses, on all ranks at once; `weight` returns one whole, by its name."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        for name, p in self.module.named_parameters():
            with torch.no_grad(), GatheredParameters([p], modifier_rank=0, enabled=self.stage == 3):
                p.data.copy_(weight(name).view(p.data.shape))

    def _clip_fp32_gradients(self) -> None:
        """Clip, keep the norm, and skip: what DeepSpeed's wrapped optimizers do, and stage 0 in fp32 has none."""
        parameters = list(self.module.parameters())
        self._grad_norm = float(nn.utils.clip_grad_norm_(parameters, self._max_norm))
        if self._discarding or not math.isfinite(self._grad_norm):
            for p in parameters:
                p.grad = None  # AdamW passes over it

    def ensure_moments(self, step: int) -> None:
        """Make AdamW's state, which torch makes only in a first step, and set its step count."""
        for flat in self._flat_masters():
            state = self.base.state[flat]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(flat)
            state["step"] = torch.tensor(float(step))

    def fragments(self, rank: int, owned: bool = True) -> Iterator[Fragment]:
        """Yield the pieces that this rank holds.

        With `owned`, over all ranks each element of each parameter occurs once, though several may hold it (stage 0).
        """
        masters = self._replicated_masters() if self.stage == 0 else {}
        parameters: Iterable[tuple[str, Any]] = self.module.named_parameters()  # with attributes of DeepSpeed's
        for i, (name, p) in enumerate(parameters):
            shape = tuple(getattr(p, "ds_shape", p.shape))
            if not p.requires_grad:
                start, weight = self._frozen(p, rank, skip=owned and i % self.world != rank)
                if weight.numel():
                    yield Fragment(name, shape, start, {"weight": weight})
                continue
            if self.stage == 0:
                if not owned or i % self.world == rank:
                    yield self._fragment(name, shape, 0, masters[id(p)], 0, p.numel())
            elif self.stage == 3:
                group, offset, partition = self.engine.optimizer.grad_position[self.engine.optimizer.get_param_id(p)]
                start = rank * partition
                numel = max(0, min(partition, p.ds_numel - start))  # the last partition is padded
                if numel:
                    flat = self.engine.optimizer.fp32_partitioned_groups_flat[group]
                    yield self._fragment(name, shape, start, flat, offset, numel)
            elif (link := p._hp_mapping) is not None:
                flat = self.base.param_groups[link.param_group_index]["params"][0]
                address = link.hp_fragment_address
                yield self._fragment(name, shape, link.lp_fragment_address.start, flat, address.start, address.numel)

    def _fragment(
        self, name: str, shape: tuple[int, ...], start: int, flat: Tensor, offset: int, numel: int
    ) -> Fragment:
        kinds = {"weight": flat.data} | {moment: self.base.state[flat][moment] for moment in MOMENTS}
        return Fragment(
            name, shape, start, {kind: full.view(-1).narrow(0, offset, numel) for kind, full in kinds.items()}
        )

    def _frozen(self, p: Any, rank: int, skip: bool) -> tuple[int, Tensor]:
        if self.stage != 3:
            return 0, p.data.view(-1)[: 0 if skip else p.numel()]
        start = rank * p.ds_tensor.ds_numel
        return start, p.ds_tensor.data.view(-1)[: max(0, min(p.ds_tensor.ds_numel, p.ds_numel - start))]

    def _replicated_masters(self) -> dict[int, Tensor]:
        """Stage 0: map each parameter (by identity) to its fp32 master: itself, or bf16's copy."""
        wrapped = self.engine.optimizer
        if wrapped is self.base:
            return {id(p): p for group in self.base.param_groups for p in group["params"]}
        pairs = zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True)
        return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def _flat_masters(self) -> list[Tensor]:
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self.base.param_groups for p in group["params"]]

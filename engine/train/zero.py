"""A model under DeepSpeed ZeRO: the only module that imports DeepSpeed.

`ZeroModel` hides how a ZeRO stage lays out fp32 master weights and optimizer moments: `fragments` yields each rank's own
as flat tensors with their offsets in the parameter, which is all that a layout-free checkpoint needs.
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
from engine.errors import UserError, did_you_mean
from engine.train.meter import StepMeter
from engine.train.optimizer import MOMENTS, MatrixSlice, Muon, make_optimizer

EMA = "ema"  # kind of the fragments that hold the moving average of the weights
COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced",
    "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "barrier",
)  # fmt: skip
ALL_MOMENTS = [moment for moments in MOMENTS.values() for moment in moments]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_CLIP = 1e30  # DeepSpeed reports a gradient norm only if it clips


@dataclass(frozen=True)
class Fragment:
    """This rank's flat part of a parameter: `tensors` are views, kind -> [numel], of the tensors in use."""

    name: str
    shape: tuple[int, ...]
    start: int  # offset in the flattened parameter, in elements
    tensors: dict[str, Tensor]  # "weight" always; the moments and "ema" if the parameter is trained


def deepspeed_config(config: Config, precision: str, parameters: int) -> dict[str, Any]:
    """Derive DeepSpeed's config. Gradient accumulation and the mean over the global batch are off: the loop does them."""
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "overlap_comm": False,
        "reduce_bucket_size": min(int(5e8), parameters),  # DeepSpeed allocates the full bucket, a gigabyte by default
        **config.zero.options,
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
        "fp16": {"enabled": precision == "fp16", "loss_scale": 1.0},  # the scale is in the train state
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def check_options(options: dict[str, Any]) -> None:
    """Raise UserError for a name in zero.options that DeepSpeed does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = DeepSpeedZeroConfig.model_fields
    if unknown := [name for name in options if name not in known]:
        raise UserError(
            f"zero.options.{unknown[0]} is not an option of DeepSpeed's ZeRO config{did_you_mean(unknown[0], known)}"
        )


def import_deepspeed() -> Any:
    """Import DeepSpeed without log output, and without two thirds of its imports, which training does not use.

    Those are MLflow, for its autotuner, and Inductor, which the `@torch.compile` of its Muon imports when any optimizer
    is checked.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with without_mlflow(), mock.patch("torch.compile", lambda function: function):
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Compiled at startup (20 s) and used in inference only: training uses torch's collectives.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # All ranks have equal weights already, and broadcasting fails for a scalar parameter (CLIP's temperature).
    deepspeed.DeepSpeedEngine._broadcast_model = lambda engine: None
    deepspeed.zero.Init._zero_init_param = convert_and_partition
    return deepspeed


def convert_and_partition(init: Any, parameter: nn.Parameter) -> None:
    """Shard a weight for stage 3 as DeepSpeed does, in the run's precision and without broadcasting it first."""
    parameter.data = parameter.data.to(init.dtype)
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_mlflow() -> Iterator[None]:
    """Make `import mlflow` fail in the block, unless it was imported before."""
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # makes the import fail
    try:
        yield
    finally:
        if absent:
            del sys.modules["mlflow"]


def all_reduce_sum(full: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place."""
    torch.distributed.all_reduce(full)
    return full


def timed_collective(collective: Callable[..., Any], meter: StepMeter) -> Callable[..., Any]:
    """Wrap a collective so that its time, and the wait for it if it is asynchronous, counts as communication."""

    @torch.compiler.disable
    def wrapper(*args: Any, **options: Any) -> Any:
        with meter.phase("communication"):
            work = collective(*args, **options)
        return TimedWork(work, meter) if hasattr(work, "wait") else work

    return wrapper


class TimedWork:
    """A running asynchronous collective, whose wait counts as communication."""

    def __init__(self, work: Any, meter: StepMeter) -> None:
        """Wrap torch's handle `work`."""
        self._work, self._meter = work, meter

    def wait(self, *args: Any) -> Any:
        """Wait until the collective has ended."""
        with self._meter.phase("communication"):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class ZeroModel:
    """A model, its gradients and its optimizer state, sharded over the ranks by ZeRO."""

    def __init__(self, model: nn.Module, config: Config, world_size: int, precision: str) -> None:
        """Shard `model` (fp32, with equal weights on all ranks). The process group must be initialized."""
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # read by the CPU accelerator
        deepspeed = import_deepspeed()
        check_options(config.zero.options)
        dtype = DTYPES[precision]
        optimizer = make_optimizer(model, config.optim, dtype)
        options = deepspeed_config(config, precision, sum(p.numel() for p in model.parameters()))
        if config.zero.stage == 3:  # one weight at a time: `initialize` would first convert the full model
            deepspeed.zero.Init(module=model, config_dict_or_path=options)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=options, dist_init_required=False
        )
        self.optimizer = optimizer
        self.world_size = world_size
        self.stage = config.zero.stage
        self.ema_decay = config.train.ema
        self.updates = 0
        self._max_norm = config.optim.clip or NO_CLIP
        self._skipping_step = False
        self._grad_norm = 0.0
        self._loss_scale: float | None = None
        self.engine.clip_fp32_gradients = self._clip_fp32_gradients
        if isinstance(optimizer, Muon) and self.stage > 0:
            optimizer.matrix_slices, optimizer.all_reduce = self._matrix_slices, all_reduce_sum

    @property
    def module(self) -> nn.Module:
        """The transformers module."""
        module: nn.Module = self.engine.module
        return module

    def __call__(self, **inputs: Any) -> Any:
        """Run the model forward."""
        return self.engine(**inputs)

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode."""
        self.engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`; its sum over all ranks and micro-batches is the mean loss of the global batch."""
        if self._loss_scale and self.stage == 0:
            loss = loss * self._loss_scale  # DeepSpeed applies it at the other stages only
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)  # DeepSpeed divides by the world size

    @property
    def loss_scale(self) -> float | None:
        """The factor on the loss in fp16, which keeps small gradients from underflow; None in other precisions."""
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float | None) -> None:
        self._loss_scale = scale
        if scale:
            self.engine.optimizer.loss_scale = scale

    def step(self, lr: float) -> float:
        """Clip the gradients, update the weights with learning rate `lr`, clear the gradients; return the norm before clipping.

        If the norm is infinite or NaN (it is the same on all ranks), weights and moments stay unchanged.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.engine.step()
        unscale = self._loss_scale if self._loss_scale and self.stage == 0 else 1.0
        grad_norm = float(self.engine.get_global_grad_norm() or self._grad_norm) / unscale
        if not self.engine.was_step_applied() or not math.isfinite(grad_norm):
            return math.inf
        self.updates += 1
        self._update_ema()
        return grad_norm

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Update the moving average of the weights, with a smaller decay at first, so that it forgets the initial weights."""
        if self.ema_decay:
            decay = min(self.ema_decay, (1 + self.updates) / (10 + self.updates))
            flats = [flat for flat, _ in self._master_weights()]
            torch._foreach_lerp_([self.optimizer.state[flat][EMA] for flat in flats], flats, 1 - decay)

    def skip_step(self) -> None:
        """Clear the gradients and keep weights and moments, as DeepSpeed does when the gradient norm is not finite."""
        from deepspeed.runtime import utils
        from deepspeed.runtime.zero import stage3, stage_1_and_2

        with contextlib.ExitStack() as stack:
            for module in (utils, stage_1_and_2, stage3):
                stack.enter_context(mock.patch.object(module, "is_invalid_grad_norm", return_value=True))
            self._skipping_step = True
            self.engine.step()
            self._skipping_step = False

    def _clip_fp32_gradients(self) -> None:
        """Clip the gradients, or drop them if the step is skipped. Stage 0 in fp32 only, where DeepSpeed does neither."""
        parameters = list(self.module.parameters())
        self._grad_norm = float(nn.utils.clip_grad_norm_(parameters, self._max_norm))
        if self._skipping_step or not math.isfinite(self._grad_norm):
            for p in parameters:
                p.grad = None  # AdamW skips it

    def time_collectives(self, meter: StepMeter) -> None:
        """Make the meter count the time of DeepSpeed's collectives as communication."""
        if self.world_size == 1:
            return
        import deepspeed.comm.comm

        backend = deepspeed.comm.comm.cdb
        for name in COLLECTIVES:
            setattr(backend, name, timed_collective(getattr(type(backend), name).__get__(backend), meter))

    def init_optimizer_state(self, updates: int) -> None:
        """Create the optimizer state, which torch creates only in the first step, and the EMA; `updates`: the update count."""
        self.updates = updates
        for flat, group in self._master_weights():
            state = self.optimizer.state[flat]
            for moment in MOMENTS[group["muon"]]:
                if moment not in state:
                    state[moment] = torch.zeros_like(flat)
            if self.ema_decay:
                state[EMA] = flat.detach().clone()
            if not group["muon"]:
                state["step"] = torch.tensor(float(updates))

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Use the moving average of the weights in the block."""
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        for flat, _ in self._master_weights():
            ema = self.optimizer.state[flat][EMA]
            weights = flat.detach().clone()
            flat.copy_(ema)
            ema.copy_(weights)
        self.load_master_weights()

    @torch.no_grad()
    def load_master_weights(self) -> None:
        """Copy the fp32 master weights to the model's weights, after the masters were overwritten."""
        zero_optimizer = self.engine.optimizer
        if self.stage == 3:
            zero_optimizer._partition_all_parameters()
            for i in range(len(zero_optimizer.fp16_groups)):
                zero_optimizer._reassign_or_swap_out_partitioned_parameters(i)
            zero_optimizer._post_step(set())
        elif self.stage > 0:
            zero_optimizer.update_lp_params()
        elif zero_optimizer is not self.optimizer:
            for lows, highs in zip(zero_optimizer.fp16_groups, zero_optimizer.fp32_groups, strict=True):
                torch._foreach_copy_(lows, highs)

    def fragments(self, rank: int, owned: bool = True) -> Iterator[Fragment]:
        """Yield the fragments that this rank holds.

        With `owned`, each element of each parameter occurs on one rank only, even if several hold it (stage 0).
        """
        masters = self._replicated_master_weights() if self.stage == 0 else {}
        parameters: Iterable[tuple[str, Any]] = self.module.named_parameters()  # with DeepSpeed's attributes
        for i, (name, p) in enumerate(parameters):
            shape = tuple(getattr(p, "ds_shape", p.shape))
            if not p.requires_grad:
                start, weight = self._frozen(p, rank, skip=owned and i % self.world_size != rank)
                if weight.numel():
                    yield Fragment(name, shape, start, {"weight": weight})
                continue
            if self.stage == 0:
                if not owned or i % self.world_size == rank:
                    yield self._fragment(name, shape, 0, masters[id(p)], 0, p.numel())
            elif (piece := self._slice_of(p)).numel:
                yield self._fragment(name, shape, piece.start, self._flat_of(p), piece.offset, piece.numel)

    def _fragment(
        self, name: str, shape: tuple[int, ...], start: int, flat: Tensor, offset: int, numel: int
    ) -> Fragment:
        state = self.optimizer.state[flat]
        kinds = {"weight": flat.data} | {kind: state[kind] for kind in (*ALL_MOMENTS, EMA) if kind in state}
        return Fragment(
            name, shape, start, {kind: full.view(-1).narrow(0, offset, numel) for kind, full in kinds.items()}
        )

    def _flat_of(self, p: Any) -> Tensor:
        zero_optimizer = self.engine.optimizer
        flat: Tensor
        if self.stage == 3:
            flat = zero_optimizer.fp32_partitioned_groups_flat[
                zero_optimizer.grad_position[zero_optimizer.get_param_id(p)][0]
            ]
        else:
            flat = self.optimizer.param_groups[p._hp_mapping.param_group_index]["params"][0]
        return flat

    def _frozen(self, p: Any, rank: int, skip: bool) -> tuple[int, Tensor]:
        if self.stage != 3:
            return 0, p.data.view(-1)[: 0 if skip else p.numel()]
        start = rank * p.ds_tensor.ds_numel
        return start, p.ds_tensor.data.view(-1)[: max(0, min(p.ds_tensor.ds_numel, p.ds_numel - start))]

    def _replicated_master_weights(self) -> dict[int, Tensor]:
        """Stage 0: map each parameter (by id) to its fp32 master weights: itself in fp32, else a copy."""
        zero_optimizer = self.engine.optimizer
        if zero_optimizer is self.optimizer:
            return {id(p): p for group in self.optimizer.param_groups for p in group["params"]}
        pairs = zip(zero_optimizer.fp16_groups, zero_optimizer.fp32_groups, strict=True)
        return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def _master_weights(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return the fp32 tensors that the optimizer updates, each with its parameter group."""
        groups = self.optimizer.param_groups
        if self.stage == 3:
            zero_optimizer = self.engine.optimizer
            return [
                (flat, groups[zero_optimizer.sub_group_to_group_id[i]])
                for i, flat in enumerate(zero_optimizer.fp32_partitioned_groups_flat)
            ]
        return [(p, group) for group in groups for p in group["params"]]

    def _matrix_slices(self, flat: Tensor) -> list[MatrixSlice]:
        """Return the slices of a group's matrices in this rank's flat tensor, including empty ones."""
        zero_optimizer = self.engine.optimizer
        if self.stage == 3:
            index = next(i for i, other in enumerate(zero_optimizer.fp32_partitioned_groups_flat) if other is flat)
            return [self._slice_of(p) for p in zero_optimizer.fp16_groups[index]]
        index = next(i for i, other in enumerate(zero_optimizer.single_partition_of_fp32_groups) if other is flat)
        return [self._slice_of(p) for p in zero_optimizer.bit16_groups[index]]

    def _slice_of(self, p: Any) -> MatrixSlice:
        """Return the slice of a parameter that this rank holds, at stages 1 to 3."""
        if self.stage == 3:
            _, offset, partition = self.engine.optimizer.grad_position[self.engine.optimizer.get_param_id(p)]
            start = torch.distributed.get_rank() * partition
            numel = max(0, min(partition, p.ds_numel - start))  # the last partition is padded
            return MatrixSlice(tuple(p.ds_shape), start if numel else 0, offset, numel)
        if (link := p._hp_mapping) is None:
            return MatrixSlice(tuple(p.shape), 0, 0, 0)
        address = link.hp_fragment_address
        return MatrixSlice(tuple(p.shape), link.lp_fragment_address.start, address.start, address.numel)

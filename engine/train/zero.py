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
from engine.errors import UserError, nearest
from engine.train.meter import Meter
from engine.train.optimizer import MOMENTS, Muon, Part, make_optimizer

AVERAGE = "ema"  # the kind of tensor that holds the moving average of the weights
COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced",
    "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "barrier",
)  # fmt: skip
ALL_MOMENTS = [moment for moments in MOMENTS.values() for moment in moments]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_CLIP = 1e30  # DeepSpeed reports a gradient norm only while it clips


@dataclass(frozen=True)
class Fragment:
    """A flat piece of a parameter that this rank owns: `tensors` are views, kind -> [numel], into live storage."""

    name: str
    shape: tuple[int, ...]
    start: int  # offset of the piece in the flattened parameter, in elements
    tensors: dict[str, Tensor]  # "weight" always; the moments and "ema" where the parameter is trained


def deepspeed_config(config: Config, precision: str, parameters: int) -> dict[str, Any]:
    """Derive DeepSpeed's config. The loop owns accumulation and the mean over the global batch, so its own are off."""
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "overlap_comm": False,
        "reduce_bucket_size": min(int(5e8), parameters),  # DeepSpeed allots the whole bucket, a gigabyte by default
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
        "fp16": {"enabled": precision == "fp16", "loss_scale": 1.0},  # the run's state holds the scale
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def check_options(options: dict[str, Any]) -> None:
    """Raise UserError for a name among zero.options that DeepSpeed doesn't know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = DeepSpeedZeroConfig.model_fields
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"zero.options.{unknown[0]} is no option of DeepSpeed's{nearest(unknown[0], known)}")


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
    # All ranks have made equal weights, and sending them fails on one that is a single number (CLIP's temperature).
    deepspeed.DeepSpeedEngine._broadcast_model = lambda engine: None
    deepspeed.zero.Init._zero_init_param = convert_and_partition
    return deepspeed


def convert_and_partition(init: Any, parameter: nn.Parameter) -> None:
    """Shard a weight for stage 3: what DeepSpeed does, but for sending it to all ranks before, and in the run's precision."""
    parameter.data = parameter.data.to(init.dtype)
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]


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


def joined(full: Tensor) -> Tensor:
    """Add up a tensor over the ranks."""
    torch.distributed.all_reduce(full)
    return full


def timed(collective: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    """Return the collective, which notes its time, and that of the wait for it where it is asynchronous."""

    @torch.compiler.disable
    def noted(*args: Any, **options: Any) -> Any:
        with meter.during("communication"):
            work = collective(*args, **options)
        return TimedWork(work, meter) if hasattr(work, "wait") else work

    return noted


class TimedWork:
    """A collective under way, whose wait counts as communication."""

    def __init__(self, work: Any, meter: Meter) -> None:
        """Stand for `work`, torch's handle."""
        self._work, self._meter = work, meter

    def wait(self, *args: Any) -> Any:
        """Wait for the end."""
        with self._meter.during("communication"):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class ZeroModel:
    """A model, its gradients and its optimizer, spread over the workers by ZeRO."""

    def __init__(self, model: nn.Module, config: Config, world: int, precision: str) -> None:
        """Shard `model` (fp32, with equal weights on all ranks). The process group must be up."""
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # read by the CPU accelerator
        deepspeed = import_deepspeed()
        check_options(config.zero.options)
        dtype = DTYPES[precision]
        optimizer = make_optimizer(model, config.optim, dtype)
        options = deepspeed_config(config, precision, sum(p.numel() for p in model.parameters()))
        if (
            config.zero.stage == 3
        ):  # weight by weight: what `initialize` shards it has made whole in its precision before
            deepspeed.zero.Init(module=model, config_dict_or_path=options)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=options, dist_init_required=False
        )
        self.base = optimizer
        self.world = world
        self.stage = config.zero.stage
        self.average = config.train.ema
        self.updates = 0
        self._max_norm = config.optim.clip or NO_CLIP
        self._discarding = False
        self._grad_norm = 0.0
        self._loss_scale: float | None = None
        self.engine.clip_fp32_gradients = self._clip_fp32_gradients
        if isinstance(optimizer, Muon) and self.stage > 0:
            optimizer.parts, optimizer.join = self._parts, joined

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
        if self._loss_scale and self.stage == 0:
            loss = loss * self._loss_scale  # which DeepSpeed does at the other stages only
        self.engine.backward(loss * self.world, scale_wrt_gas=False)  # DeepSpeed divides by the world size

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by in fp16, so that small gradients aren't lost; None in other precisions."""
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float | None) -> None:
        self._loss_scale = scale
        if scale:
            self.engine.optimizer.loss_scale = scale

    def step(self, lr: float) -> float:
        """Clip, update the weights with learning rate `lr`, clear the gradients; return the norm before clipping.

        Where the norm is infinite or NaN, which it then is on all ranks, weights and moments stay as they are.
        """
        for group in self.base.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.engine.step()
        unscale = self._loss_scale if self._loss_scale and self.stage == 0 else 1.0
        norm = float(self.engine.get_global_grad_norm() or self._grad_norm) / unscale
        if not self.engine.was_step_applied() or not math.isfinite(norm):
            return math.inf
        self.updates += 1
        self._follow()
        return norm

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the moving average follow the weights; faster at first, when it would else remember the fresh ones."""
        if self.average:
            decay = min(self.average, (1 + self.updates) / (10 + self.updates))
            flats = [flat for flat, _ in self._masters()]
            torch._foreach_lerp_([self.base.state[flat][AVERAGE] for flat in flats], flats, 1 - decay)

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

    def _clip_fp32_gradients(self) -> None:
        """Clip, keep the norm, and skip: what DeepSpeed's wrapped optimizers do, and stage 0 in fp32 has none."""
        parameters = list(self.module.parameters())
        self._grad_norm = float(nn.utils.clip_grad_norm_(parameters, self._max_norm))
        if self._discarding or not math.isfinite(self._grad_norm):
            for p in parameters:
                p.grad = None  # AdamW passes over it

    def time_collectives(self, meter: Meter) -> None:
        """Have the meter tell DeepSpeed's communication from the phase that waits for it."""
        if self.world == 1:
            return
        import deepspeed.comm.comm

        backend = deepspeed.comm.comm.cdb
        for name in COLLECTIVES:
            setattr(backend, name, timed(getattr(type(backend), name).__get__(backend), meter))

    def ensure_moments(self, updates: int) -> None:
        """Make the optimizer's state, which torch makes only in a first step, and the average; `updates` were made."""
        self.updates = updates
        for flat, group in self._masters():
            state = self.base.state[flat]
            for moment in MOMENTS[group["muon"]]:
                if moment not in state:
                    state[moment] = torch.zeros_like(flat)
            if self.average:
                state[AVERAGE] = flat.detach().clone()
            if not group["muon"]:
                state["step"] = torch.tensor(float(updates))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the model work with the moving average of its weights for a while."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for flat, _ in self._masters():
            average = self.base.state[flat][AVERAGE]
            kept = flat.detach().clone()
            flat.copy_(average)
            average.copy_(kept)
        self.adopt_masters()

    @torch.no_grad()
    def adopt_masters(self) -> None:
        """Give the forward pass the weights that the optimizer holds, after these were overwritten."""
        wrapped = self.engine.optimizer
        if self.stage == 3:
            wrapped._partition_all_parameters()
            for i in range(len(wrapped.fp16_groups)):
                wrapped._reassign_or_swap_out_partitioned_parameters(i)
            wrapped._post_step(set())
        elif self.stage > 0:
            wrapped.update_lp_params()
        elif wrapped is not self.base:
            for lows, highs in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
                torch._foreach_copy_(lows, highs)

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
            elif (part := self._part_of(p)).numel:
                yield self._fragment(name, shape, part.start, self._flat_of(p), part.offset, part.numel)

    def _fragment(
        self, name: str, shape: tuple[int, ...], start: int, flat: Tensor, offset: int, numel: int
    ) -> Fragment:
        state = self.base.state[flat]
        kinds = {"weight": flat.data} | {kind: state[kind] for kind in (*ALL_MOMENTS, AVERAGE) if kind in state}
        return Fragment(
            name, shape, start, {kind: full.view(-1).narrow(0, offset, numel) for kind, full in kinds.items()}
        )

    def _flat_of(self, p: Any) -> Tensor:
        wrapped = self.engine.optimizer
        flat: Tensor
        if self.stage == 3:
            flat = wrapped.fp32_partitioned_groups_flat[wrapped.grad_position[wrapped.get_param_id(p)][0]]
        else:
            flat = self.base.param_groups[p._hp_mapping.param_group_index]["params"][0]
        return flat

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

    def _masters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return the fp32 tensors that the optimizer steps, each with its group."""
        groups = self.base.param_groups
        if self.stage == 3:
            wrapped = self.engine.optimizer
            return [
                (flat, groups[wrapped.sub_group_to_group_id[i]])
                for i, flat in enumerate(wrapped.fp32_partitioned_groups_flat)
            ]
        return [(p, group) for group in groups for p in group["params"]]

    def _parts(self, flat: Tensor) -> list[Part]:
        """Return where the matrices of a group lie in this rank's flat piece of it, those of which it has nothing too."""
        wrapped = self.engine.optimizer
        if self.stage == 3:
            at = next(i for i, other in enumerate(wrapped.fp32_partitioned_groups_flat) if other is flat)
            return [self._part_of(p) for p in wrapped.fp16_groups[at]]
        at = next(i for i, other in enumerate(wrapped.single_partition_of_fp32_groups) if other is flat)
        return [self._part_of(p) for p in wrapped.bit16_groups[at]]

    def _part_of(self, p: Any) -> Part:
        """Return where this rank holds a parameter, at stages 1 to 3."""
        if self.stage == 3:
            _, offset, partition = self.engine.optimizer.grad_position[self.engine.optimizer.get_param_id(p)]
            start = torch.distributed.get_rank() * partition
            numel = max(0, min(partition, p.ds_numel - start))  # the last partition is padded
            return Part(tuple(p.ds_shape), start if numel else 0, offset, numel)
        if (link := p._hp_mapping) is None:
            return Part(tuple(p.shape), 0, 0, 0)
        address = link.hp_fragment_address
        return Part(tuple(p.shape), link.lp_fragment_address.start, address.start, address.numel)

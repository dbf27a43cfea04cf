"""The options of the training loop and of DeepSpeed ZeRO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from engine.config.address import check_address
from engine.config.option import Frozen, option
from engine.errors import UserError


@dataclass
class TrainConfig(Frozen):
    """The training loop. Each option states whether it is part of a run's identity."""

    workers: int = option(
        1, "number of Ray Train workers: processes, one for each GPU (or share of the CPU cores)", least=1, identity=False
    )  # fmt: skip
    gpus_per_worker: Optional[float] = option(
        None, "GPUs of a worker; None: 1 if the cluster has GPUs, else 0", least=0, identity=False
    )
    cpus_per_worker: Optional[float] = option(
        None, "CPU cores of a worker; None: the cluster's cores / workers, at least 0.5", above=0, identity=False
    )
    max_steps: int = option(100, "optimizer steps in total", least=1, identity=False)
    global_batch: Optional[int] = option(
        None, "samples in a step, over all workers; None: those of global_batch_tokens, else 32", least=1, identity=True
    )  # fmt: skip
    global_batch_tokens: Optional[int] = option(
        None, "tokens in a step, over all workers: a multiple of data.sequence_length", least=2, identity=True
    )
    micro_batch: Optional[int] = option(
        None,
        "samples in a forward pass of one worker; None: as many as fit in its memory, measured once and remembered (at most 16 on a CPU)",
        least=1, identity=False,
    )  # fmt: skip
    precision: str = option(
        "auto",
        "auto: bf16 if the hardware supports it, else fp32; fp16: GPU only, with dynamic loss scaling",
        choices=("auto", "fp32", "bf16", "fp16"), identity=True, micro_batch=True,
    )  # fmt: skip
    compile: bool = option(
        False, "torch.compile the model (the first step takes about a minute longer)", identity=False, micro_batch=True
    )
    sequence_parallel: int = option(
        1, "workers that share each sequence, for long ones (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509), of objectives that "
        "support it; a divisor of the workers and of the model's heads", least=1, identity=False, micro_batch=True,
    )  # fmt: skip
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass", identity=False, micro_batch=True
    )
    ema: float = option(
        0.0,
        "decay of an exponential moving average of the weights, smaller in the first steps; 0: no average",
        least=0, most=0.99999, identity=True, micro_batch=True,
    )  # fmt: skip
    use_ema: bool = option(False, "use the averaged weights for validation and for the bundle", identity=True)
    checkpoint_every: int = option(
        100, "steps between checkpoints; the last step always has one", least=1, identity=False
    )
    keep_checkpoints: int = option(2, "number of latest checkpoints to keep", least=1, identity=False)
    on_failed_save: str = option(
        "go_on",
        "when a checkpoint cannot be written (a full disk, say): go_on to the next one, or stop; the previous checkpoint stays intact",
        choices=("go_on", "stop"), identity=False,
    )  # fmt: skip
    mirror: Optional[str] = option(
        None, "address (s3://, gs://) or folder that receives a copy of the run while it trains: checkpoints, metrics and bundle, under "
        "the run's name; a run without a local checkpoint resumes from there", identity=False,
    )  # fmt: skip
    keep_best: bool = option(
        False, "keep the checkpoint with the best validation metric too, and make the bundle of it instead of the last one", identity=False
    )  # fmt: skip
    patience: Optional[int] = option(
        None, "early stopping: end after this many validations in a row without an improvement; None: train until max_steps", least=1, identity=False
    )  # fmt: skip
    evaluate_every: Optional[int] = option(
        None, "steps between validations; None: only at the end", least=1, identity=False
    )
    evaluate_samples: Optional[int] = option(
        256, "samples of a validation; None: the whole split", least=1, identity=False
    )
    max_skipped: int = option(
        3, "steps in a row that may be skipped for a loss spike or a non-finite gradient, before a rollback", least=0, identity=False
    )  # fmt: skip
    max_rollbacks: int = option(
        2, "rollbacks to the last good checkpoint, each skipping the data seen since then, before the run fails", least=0, identity=False
    )  # fmt: skip
    spike_sigma: Optional[float] = option(
        None, "skip a step whose loss is this many standard deviations above the mean of the last spike_window steps (6, say); None: never",
        above=0, identity=True,
    )  # fmt: skip
    spike_window: int = option(
        128, "good steps in the window of spike_sigma; no step is skipped until it is full", least=2, identity=True
    )
    max_failures: int = option(
        3, "restarts of the worker group after a lost or hung worker; of a sweep's trial after a lost one; -1: unlimited", least=-1, identity=False
    )  # fmt: skip
    hang_timeout_s: float = option(
        120.0, "seconds without progress after which a worker counts as hung and the group restarts; ten times as long for "
        "the start, the first step and the last files", above=0, identity=False,
    )  # fmt: skip
    spares: bool = option(
        True, "half a minute into a run, start a spare process for each worker, with all imports done, so that a restart takes seconds "
        "less (about 0.3 GB each)", identity=False,
    )  # fmt: skip
    min_workers: Optional[int] = option(
        None, "elastic training: continue with at least this many workers if the cluster has no room for train.workers; None: wait for all",
        least=1, identity=False,
    )  # fmt: skip
    resize_every_s: float = option(
        60.0, "elastic training: seconds between checks whether the cluster has room for more workers", above=0, identity=False
    )  # fmt: skip

    def check(self) -> None:
        """Check the worker group, the mirror and what the bundle is made of."""
        if self.workers > 1 and 0 < (self.gpus_per_worker or 0) < 1:
            raise UserError(
                f"train.gpus_per_worker {self.gpus_per_worker:g} would put several of train.workers {self.workers} on one GPU, "
                "which NCCL refuses: use train.workers=1, or whole GPUs"
            )
        if self.min_workers and self.min_workers > self.workers:
            raise UserError(
                f"train.min_workers {self.min_workers} is more than train.workers {self.workers}: "
                f"use train.min_workers={self.workers} or less"
            )
        if self.workers % self.sequence_parallel:
            raise UserError(
                f"train.workers {self.workers} cannot be divided into groups of train.sequence_parallel {self.sequence_parallel}: "
                f"use train.workers={-(-self.workers // self.sequence_parallel) * self.sequence_parallel}"
            )
        check_address("train.mirror", self.mirror)
        if self.use_ema and not self.ema:
            raise UserError("train.use_ema needs an average: set its decay with train.ema=0.999, for example")
        if self.patience and not self.evaluate_every:
            raise UserError(
                "train.patience counts validations and there are none: set their interval with train.evaluate_every"
            )


@dataclass
class ZeroConfig(Frozen):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054)."""

    stage: int = option(
        2, "what is sharded over the workers: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights", least=0, most=3
    )  # fmt: skip
    offload_optimizer: str = option("none", "where the optimizer states are kept", choices=("none", "cpu"))
    offload_param: str = option("none", "stage 3: where the weights are kept", choices=("none", "cpu"))
    options: dict[str, Any] = option(
        {},
        "any other option of DeepSpeed's zero_optimization, by its own name: zero_hpz_partition_size of ZeRO++, say, and on GPUs "
        "zero_quantized_weights and zero_quantized_gradients, which round what is communicated, so that losses differ by layout",
    )

    def check(self) -> None:
        """Check that the options go with the stage."""
        for name in ("stage", "offload_optimizer", "offload_param"):
            if name in self.options:
                raise UserError(f"zero.options.{name} has an option of its own: use zero.{name}=...")
        if self.offload_param != "none" and self.stage != 3:
            raise UserError(f"zero.offload_param needs zero.stage=3, not {self.stage}")
        if self.offload_optimizer != "none" and self.stage == 0:
            raise UserError("zero.offload_optimizer needs zero.stage=1 or more, not 0")

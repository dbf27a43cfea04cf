"""Checks by the planner's memory model, before a trial starts, whether it fits in its workers' memory."""

from __future__ import annotations

import json
from typing import Any

import psutil

from engine.config import Config, select, with_values
from engine.plan.plan import MALLOC_RESERVE, meta_model


class MemoryCheck:
    """The memory of a trial's worker, and the memory that trials need. Parameter counts are cached."""

    def __init__(self, config: Config, slots: int, gpus: float = 0.0) -> None:
        """`slots`: number of concurrent trials; `gpus`: of each worker, possibly a fraction; 0: none."""
        self._slots, self._gpus = slots, gpus
        self._sizes: dict[str, Any] = {}
        self.worker_memory_bytes = self._worker_memory_bytes(config)

    def _worker_memory_bytes(self, config: Config) -> float | None:
        """Return the memory of a worker's device that a trial may use; None if it is unknown."""
        import torch

        from engine.train.devices import DEVICES, RESERVED_FRACTION

        fraction = min(1.0, self._gpus or 1.0)
        if config.plan.device != "here":
            return DEVICES[config.plan.device].bytes * (1 - RESERVED_FRACTION) * fraction
        if self._gpus:  # maybe on another machine
            has_gpu = torch.cuda.is_available()
            return (
                torch.cuda.get_device_properties(0).total_memory * (1 - RESERVED_FRACTION) * fraction
                if has_gpu
                else None
            )
        return psutil.virtual_memory().total * (1 - MALLOC_RESERVE) / (config.train.workers * self._slots)

    def fit_micro_batch(self, config: Config) -> tuple[Config | None, str]:
        """Return the config with a micro-batch that fits, or None and the reason if none does."""
        if self.worker_memory_bytes is None:
            return config, ""
        requested = config.train.micro_batch
        micro_batch = requested or 1  # if none is given, the trial finds the largest itself
        while (
            needed := self._needed_bytes(with_values(config, {"train.micro_batch": micro_batch}))
        ) > self.worker_memory_bytes:
            if micro_batch == 1:
                return None, (
                    f"its workers would need {needed / 2**30:.2f} GiB each with a micro-batch of 1, and have "
                    f"{self.worker_memory_bytes / 2**30:.2f} (computed)"
                )
            micro_batch //= 2
        return (
            with_values(config, {"train.micro_batch": micro_batch}) if requested and micro_batch < requested else config
        ), ""

    def _needed_bytes(self, config: Config) -> float:
        from engine.plan.memory import peak_memory, runs_on_cpu
        from engine.train.hardware import precision

        need = peak_memory(config, self._model_sizes(config), config.zero.stage, precision(config.train))
        return need.total + (need.host if runs_on_cpu(config) else 0)

    def _model_sizes(self, config: Config) -> Any:
        """Return the parameter counts of a model, computed on the meta device once for each model config."""
        from engine.plan.memory import ModelSizes

        key = json.dumps(select(config, "parameter_count"), sort_keys=True)
        if key not in self._sizes:
            self._sizes[key] = ModelSizes.from_model(meta_model(config), config)
        return self._sizes[key]

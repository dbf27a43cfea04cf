"""Whether a trial fits its workers' memory, told by the plan before the trial takes anything."""

from __future__ import annotations

import json
from typing import Any

import psutil

from engine.config import Config, select, with_values
from engine.plan.plan import KEPT, meta_model


class MemoryCheck:
    """The memory that a worker of a trial has, and what trials need of it. What was computed once is remembered."""

    def __init__(self, config: Config, slots: int, gpus: float = 0.0) -> None:
        """`slots`: trials that run at a time; `gpus`: what each of their workers gets, a fraction or more; 0: none."""
        self._slots, self._gpus = slots, gpus
        self._sizes: dict[str, Any] = {}
        self.bytes = self._of_a_worker(config)

    def _of_a_worker(self, config: Config) -> float | None:
        """Return the bytes of a worker's device that a trial may use; None where that is not known here."""
        import torch

        from engine.train.devices import DEVICES, RESERVED_FRACTION

        share = min(1.0, self._gpus or 1.0)
        if config.plan.device != "here":
            return DEVICES[config.plan.device].bytes * (1 - RESERVED_FRACTION) * share
        if self._gpus:  # of another machine, perhaps
            here = torch.cuda.is_available()
            return torch.cuda.get_device_properties(0).total_memory * (1 - RESERVED_FRACTION) * share if here else None
        return psutil.virtual_memory().total * (1 - KEPT) / (config.train.workers * self._slots)

    def fitted(self, config: Config) -> tuple[Config | None, str]:
        """Return the config with a micro-batch that fits, or None and the reason why none does."""
        if self.bytes is None:
            return config, ""
        asked = config.train.micro_batch
        micro = asked or 1  # where none is asked for, the trial finds the largest itself
        while (needed := self._need(with_values(config, {"train.micro_batch": micro}))) > self.bytes:
            if micro == 1:
                return None, (
                    f"its workers would need {needed / 2**30:.2f} GiB each with one sample at a time, and have "
                    f"{self.bytes / 2**30:.2f} (computed)"
                )
            micro //= 2
        return (with_values(config, {"train.micro_batch": micro}) if asked and micro < asked else config), ""

    def _need(self, config: Config) -> float:
        from engine.plan.memory import memory, on_processor
        from engine.train.hardware import precision

        need = memory(config, self._sizes_of(config), config.zero.stage, precision(config.train))
        return need.total + (need.host if on_processor(config) else 0)

    def _sizes_of(self, config: Config) -> Any:
        """Count the parameters of a model, once for each shape, on the meta device."""
        from engine.plan.memory import Sizes

        key = json.dumps(select(config, "parameter_count"), sort_keys=True)
        if key not in self._sizes:
            self._sizes[key] = Sizes.of(meta_model(config), config)
        return self._sizes[key]

"""The options of the optimizer and of the learning-rate schedule."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Optional

from engine.config.option import Frozen, names_in, option
from engine.errors import UserError, did_you_mean


@dataclass
class OptimConfig(Frozen):
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), or Muon beside it."""

    name: str = option(
        "adamw",
        "adamw for all parameters, or muon for the matrices of the blocks and adamw for the rest "
        "(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)",
        choices=("adamw", "muon"), micro_batch=True, parameter_count=True,
    )  # fmt: skip
    lr: float = option(1e-3, "peak learning rate", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay, of matrices only (Brown et al. 2020)", least=0)
    beta1: float = option(0.9, "decay of the first moment", least=0, most=0.9999)
    beta2: float = option(0.95, "decay of the second moment (Brown et al. 2020)", least=0, most=0.99999)
    eps: float = option(1e-8, "term added to the denominator", above=0)
    momentum: float = option(0.95, "muon: decay of the momentum (Jordan et al. 2024)", least=0, most=0.9999)
    clip: float = option(1.0, "maximum global gradient norm; 0: no clipping", least=0)
    groups: dict[str, Any] = option(
        {},
        "parameter groups, PATTERN: {lr: FACTOR of optim.lr, weight_decay: VALUE}, for parameters whose name contains a match of the "
        "regular expression; the first match applies",
    )

    def check(self) -> None:
        """Check the parameter groups."""
        for pattern, changes in self.groups.items():
            _check_parameter_group(pattern, changes)


def _check_parameter_group(pattern: str, changes: Any) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"optim.groups: '{pattern}' is not a regular expression ({error})") from error
    known = ("lr", "weight_decay")
    for key, value in changes.items() if isinstance(changes, dict) else [(str(changes), None)]:
        if key not in known:
            raise UserError(
                f"optim.groups: {pattern}: {key} is not one of {', '.join(known)}{did_you_mean(key, known)}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise UserError(f"optim.groups: {pattern}: {key}={value} is not a number of 0 or more")


@dataclass
class ScheduleConfig(Frozen):
    """Learning rate over steps: linear warm-up to optim.lr, then `kind` down to min_ratio of it."""

    kind: str = option("cosine", "shape after the warm-up", choices=names_in("engine/train/schedules"))
    warmup_steps: Optional[int] = option(None, "warm-up steps; None: warmup_fraction of total_steps", least=0)
    warmup_fraction: float = option(0.1, "warm-up steps as a fraction of total_steps", least=0, most=1)
    total_steps: Optional[int] = option(None, "steps of the whole schedule; None: train.max_steps", least=1)
    decay_fraction: float = option(
        0.2, "wsd: decay steps as a fraction of the steps after the warm-up", above=0, most=1
    )
    min_ratio: float = option(0.1, "final learning rate as a fraction of the peak", least=0, most=1)

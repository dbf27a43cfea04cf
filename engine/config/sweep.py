"""The options of a hyperparameter search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from engine.config.option import Frozen, declared_in, names_in, option
from engine.errors import UserError

SEARCHERS = "engine/sweep/searchers"  # one module each


@dataclass
class SweepConfig(Frozen):
    """A hyperparameter search with Ray Tune over any options."""

    space: dict[str, Any] = option(
        {},
        "search space, KEY: {loguniform: [a, b]} | {uniform: [a, b]} | {choice: [...]} | {randint: [a, b]} (b excluded) | {grid: [...]}, "
        "each with when: {OTHER_KEY: VALUE} if it applies only then",
    )
    trials: int = option(
        8, "samples drawn from the search space (times the size of its grid); pbt and pb2: size of the population", least=1
    )  # fmt: skip
    max_concurrent_trials: Optional[int] = option(
        None, "maximum number of concurrent trials; None: as many as the cluster has room for", least=1, identity=False,
        formerly="concurrent",
    )  # fmt: skip
    searcher: str = option(
        "random",
        "random; grid: every combination of choices, once; tpe: Optuna's (Watanabe 2023, https://arxiv.org/abs/2304.11127); "
        "bohb: TPE on the results at the largest budget with enough of them, with scheduler=hyperband (Falkner et al. 2018)",
        choices=names_in(SEARCHERS),
    )
    scheduler: str = option(
        "asha",
        "asha (Li et al. 2020, https://arxiv.org/abs/1810.05934): a trial pauses at each rung until it is among the best there; "
        "hyperband: asha with a bracket for each number of rungs; median: the median stopping rule (Golovin et al. 2017); pbt (Jaderberg "
        "et al. 2017), pb2 (Parker-Holder et al. 2020): values change while the models train; none",
        choices=("asha", "hyperband", "median", "pbt", "pb2", "none"),
    )
    grace_steps: Optional[int] = option(
        None, "steps that every trial takes before the first rung; None: max_steps / reduction_factor squared", least=1
    )
    reduction_factor: int = option(
        3,
        "asha, hyperband, bohb: reduction factor; 1 in this many continues at each rung",
        least=2,
        formerly="reduction",
    )
    perturbation_interval: Optional[int] = option(
        None, "pbt, pb2: perturbation interval, in steps; None: max_steps / 5", least=1, formerly="interval"
    )
    quantile_fraction: float = option(
        0.25,
        "pbt, pb2: quantile fraction of the population that is replaced by copies of the best ones (Jaderberg et al. 2017)",
        above=0,
        most=0.5,
        formerly="quantile",
    )
    metric: Optional[str] = option(
        None, "validation metric; None: the objective's own; with searcher=tpe several: accuracy+ece (the first one stops trials and chooses the bundle)",
    )  # fmt: skip
    mode: Optional[str] = option(None, "min or max, of several metrics max+min; None: the objective's own")
    retrain_steps: Optional[int] = option(
        None, "train once more with the best trial's values, for this many steps, and make the bundle of that", least=1
    )
    soup: Optional[int] = option(
        None, "model soup: greedily average the weights of this many best trials, if that improves the validation metric "
        "(Wortsman et al. 2022, https://arxiv.org/abs/2203.05482)", least=2,
    )  # fmt: skip

    def check(self) -> None:
        """Check that metric, mode, searcher and scheduler go together."""
        metrics, modes = (self.metric or "").split("+"), (self.mode or "").split("+")
        for mode in modes if self.mode else ():
            if mode not in ("min", "max"):
                raise UserError(f"sweep.mode={self.mode}: '{mode}' is not one of min, max")
        if len(metrics) != len(modes) and (len(metrics) > 1 or len(modes) > 1):
            raise UserError(
                f"sweep.metric has {len(metrics)} and sweep.mode {len(modes)} parts: give min or max for each, as in "
                "sweep.metric=accuracy+loss sweep.mode=max+min"
            )
        if len(metrics) > 1 and not declared_in(SEARCHERS, self.searcher, "HAS_SEVERAL_METRICS"):
            raise UserError(f"sweep.searcher={self.searcher} optimizes one metric: use sweep.searcher=tpe for several")
        required = declared_in(SEARCHERS, self.searcher, "REQUIRED_SCHEDULER", self.scheduler)
        if self.scheduler != required:
            raise UserError(
                f"sweep.searcher={self.searcher} needs another scheduler, and sweep.scheduler is {self.scheduler}: "
                f"use sweep.scheduler={required}"
            )
        if self.scheduler in ("pbt", "pb2") and self.searcher != "random":
            raise UserError(
                f"sweep.scheduler={self.scheduler} draws its first values at random and then changes them: leave out sweep.searcher"
            )
        if self.soup and self.retrain_steps:
            raise UserError("sweep.soup and sweep.retrain_steps both make the bundle: use one of them")

"""BOHB: TPE on the results at the largest budget that has enough of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from engine.config import Config
from engine.sweep.optuna_trials import quiet_optuna
from engine.sweep.search_space import SearchSpace
from engine.sweep.searchers.tpe import TpeSearcher, trial_seed
from engine.sweep.trial_record import Trial

REQUIRED_SCHEDULER = "hyperband"
RANDOM_FRACTION = 1 / 3  # of the trials (Falkner et al. 2018, section 4.1)


def make(
    space: SearchSpace, config: Config, metrics: Sequence[str], modes: Sequence[str], rungs: Sequence[int]
) -> BohbSearcher:
    """Return the searcher."""
    return BohbSearcher(space, config, metrics[0], modes[0], rungs)


class BohbSearcher(TpeSearcher):
    """BOHB (Falkner et al. 2018): TPE on the results at the largest number of steps that enough trials have reached.

    https://arxiv.org/abs/1807.01774, section 4.1: a model needs the space's dimensions + 2 results; a third of the trials
    are random. Hyperband, which decides on the steps, is the scheduler's part.
    """

    def __init__(self, space: SearchSpace, config: Config, metric: str, mode: str, rungs: Sequence[int]) -> None:
        """Model the results at the `rungs` (steps) and at the last step."""
        super().__init__(space, config, [metric], [mode])
        self._budgets = [*rungs, config.train.max_steps]

    def suggest_params(self, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Suggest the params of trial `index`."""
        min_results = len(self._space) + 2
        if random.Random(trial_seed(self._config.seed, index)).random() < RANDOM_FRACTION:
            return self._suggest(index, [], startup=1)
        results = results_at(trials, self._budgets)
        budget = max((b for b in self._budgets if len(results[b]) >= min_results), default=None)
        complete = quiet_optuna().trial.TrialState.COMPLETE
        observed = results[budget] if budget else []
        return self._suggest(
            index, [self._optuna_trial(trial, complete, value=v) for trial, v in observed], startup=min_results
        )


def results_at(trials: Sequence[Trial], budgets: Sequence[int]) -> dict[int, list[tuple[Trial, float]]]:
    """Return, for each budget (steps), the trials that have reached it, with their first value from there on."""
    results: dict[int, list[tuple[Trial, float]]] = defaultdict(list)
    for trial in trials:
        for budget in budgets:
            if (value := next((v for step, v in trial.curve if step >= budget), None)) is not None:
                results[budget].append((trial, value))
    return results

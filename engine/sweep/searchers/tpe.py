"""Optuna's tree-structured Parzen estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from engine.config import Config
from engine.sweep.optuna_trials import distribution, quiet_optuna, suggest
from engine.sweep.search_space import SearchSpace
from engine.sweep.trial_record import PAUSED, Trial

HAS_SEVERAL_METRICS = True
STARTUP_TRIALS = 10  # random trials before TPE uses its model: Optuna's default


def make(
    space: SearchSpace, config: Config, metrics: Sequence[str], modes: Sequence[str], rungs: Sequence[int]
) -> TpeSearcher:
    """Return the searcher."""
    return TpeSearcher(space, config, metrics, modes)


class TpeSearcher:
    """Optuna's tree-structured Parzen estimator (TPE), given all trials for each suggestion.

    Watanabe 2023, https://arxiv.org/abs/2304.11127; with several metrics by Ozaki et al. 2022. Suggestions
    depend only on space, seed, index and records, so a searcher that restarts after a kill repeats none.
    """

    def __init__(self, space: SearchSpace, config: Config, metrics: Sequence[str], modes: Sequence[str]) -> None:
        """Search the space for the best values of the metrics."""
        self._space, self._config, self._metrics = space, config, list(metrics)
        self._directions = ["minimize" if mode == "min" else "maximize" for mode in modes]

    def __len__(self) -> int:
        """Return the number of trials."""
        return self._config.sweep.trials

    def suggest_params(self, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Suggest the params of trial `index`."""
        return self._suggest(index, [self._to_optuna(trial) for trial in trials], STARTUP_TRIALS)

    def _suggest(self, index: int, optuna_trials: list[Any], startup: int) -> dict[str, Any]:
        optuna = quiet_optuna()
        sampler = optuna.samplers.TPESampler(seed=trial_seed(self._config.seed, index), n_startup_trials=startup)
        study = optuna.create_study(directions=self._directions, sampler=sampler)
        study.add_trials(optuna_trials)
        optuna_trial, params = study.ask(), dict[str, Any]()
        for key, domain in self._space.items():
            if domain.is_active(params, self._config):
                params[key] = suggest(optuna_trial, key, domain)
        return params

    def _to_optuna(self, trial: Trial) -> Any:
        """Convert a trial's record to an Optuna trial."""
        states = quiet_optuna().trial.TrialState
        if trial.state == "running":
            return self._optuna_trial(trial, states.RUNNING)
        values = [trial.value, *(trial.others.get(name) for name in self._metrics[1:])]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if trial.state == "finished" and len(known) == len(self._metrics):
            return self._optuna_trial(trial, states.COMPLETE, values=known)
        if trial.state in ("stopped early", PAUSED) and len(self._metrics) == 1:
            return self._optuna_trial(trial, states.PRUNED, intermediate_values=dict(trial.curve))
        return self._optuna_trial(trial, states.FAIL)

    def _optuna_trial(self, trial: Trial, state: Any, **values: Any) -> Any:
        distributions = {key: distribution(self._space[key]) for key in trial.params}
        return quiet_optuna().trial.create_trial(
            state=state, params=trial.params, distributions=distributions, **values
        )


def trial_seed(seed: int, index: int) -> int:
    """Return the seed of trial `index`."""
    return (seed * 1_000_003 + index) % 2**32

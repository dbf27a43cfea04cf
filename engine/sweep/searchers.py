"""Searchers, which choose the params of a trial: random or grid search, or Optuna's TPE on the results so far.

A searcher has no state besides the trials' records, so that a sweep can resume after a kill.
"""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from engine.config import Config
from engine.sweep.search_space import SearchSpace, grid_params, random_params
from engine.sweep.trial_record import PAUSED, Trial

STARTUP_TRIALS = 10  # random trials before TPE uses its model: Optuna's default
RANDOM_FRACTION = 1 / 3  # BOHB: fraction of random trials (Falkner et al. 2018, section 4.1)


class ListSearcher:
    """Params that are known beforehand: random samples or grid combinations."""

    def __init__(self, params: list[dict[str, Any]]) -> None:
        """Suggest these params, by trial index."""
        self._params = params

    def __len__(self) -> int:
        """Return the number of trials."""
        return len(self._params)

    def suggest_params(self, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Return the params of trial `index`."""
        return self._params[index]


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
        sampler = optuna.samplers.TPESampler(seed=_seed(self._config.seed, index), n_startup_trials=startup)
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
        if random.Random(_seed(self._config.seed, index)).random() < RANDOM_FRACTION:
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


Searcher = ListSearcher | TpeSearcher


def make_searcher(
    space: SearchSpace, config: Config, metrics: Sequence[str], modes: Sequence[str], rungs: Sequence[int]
) -> Searcher:
    """Return the searcher of sweep.searcher."""
    kind = config.sweep.searcher
    if kind == "grid":
        return ListSearcher(grid_params(space, config))
    if kind == "tpe":
        return TpeSearcher(space, config, metrics, modes)
    if kind == "bohb":
        return BohbSearcher(space, config, metrics[0], modes[0], rungs)
    return ListSearcher(random_params(space, config, config.seed))


def suggest(optuna_trial: Any, key: str, domain: Any) -> Any:
    """Have an Optuna trial suggest a param's value."""
    if domain.is_listed:
        return optuna_trial.suggest_categorical(key, list(domain.values))
    low, high = domain.values
    if domain.kind == "randint":
        return optuna_trial.suggest_int(key, low, high - 1)
    return optuna_trial.suggest_float(key, low, high, log=domain.kind == "loguniform")


def distribution(domain: Any) -> Any:
    """Convert a domain to Optuna's distribution."""
    distributions = quiet_optuna().distributions
    if domain.is_listed:
        return distributions.CategoricalDistribution(domain.values)
    low, high = domain.values
    if domain.kind == "randint":
        return distributions.IntDistribution(low, high - 1)
    return distributions.FloatDistribution(low, high, log=domain.kind == "loguniform")


def quiet_optuna() -> Any:
    """Import Optuna, which takes most of a second, without its log output for each trial."""
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % 2**32


def importances(space: SearchSpace, trials: Sequence[Trial], mode: str) -> dict[str, float]:
    """Return each param's importance, its share of the variance between trials, the largest first; empty for too few trials.

    By fANOVA (Hutter et al. 2014) if every trial has all params, else by conditional PED-ANOVA (Watanabe et al. 2023), both
    Optuna's; a trial that was stopped early counts with its last value.
    """
    usable = [t for t in trials if t.value is not None and math.isfinite(t.value) and set(t.params) <= set(space)]
    keys = {key for t in usable for key in t.params}
    if len(usable) < 4 or len({t.value for t in usable}) < 2 or not keys:
        return {}
    optuna = quiet_optuna()
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    for t in usable:
        distributions = {key: distribution(space[key]) for key in t.params}
        study.add_trial(optuna.trial.create_trial(params=t.params, distributions=distributions, value=t.value))
    all_have_all_keys = all(set(t.params) == keys for t in usable)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0) if all_have_all_keys else None
    shares: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {
        key: float(value) for key, value in sorted(shares.items(), key=lambda item: -item[1]) if math.isfinite(value)
    }

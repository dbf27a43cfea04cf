"""Which values a trial gets: drawn, enumerated, or proposed by Optuna from what the trials before it have shown.

A searcher keeps nothing that the trials' records don't hold: after a kill it is told of them again and goes on.
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

STARTUP_TRIALS = 10  # trials drawn at random before TPE models anything: Optuna's own choice
RANDOM_FRACTION = 1 / 3  # bohb: share of the trials that are drawn at random (Falkner et al. 2018, section 4.1)


class ListSearcher:
    """Values that are known beforehand: a random search's draws, or a grid's combinations."""

    def __init__(self, params: list[dict[str, Any]]) -> None:
        """Hand these out, by index."""
        self._params = params

    def __len__(self) -> int:
        """Count the trials."""
        return len(self._params)

    def ask(self, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Return the values of the trial `index`."""
        return self._params[index]


class TpeSearcher:
    """Optuna's tree-structured Parzen estimator, told of all trials that there are each time that it is asked.

    Watanabe 2023, https://arxiv.org/abs/2304.11127; with several metrics by Ozaki et al. 2022. What it proposes depends on
    the space, the seed, the index and the records alone, so a searcher that starts again after a kill repeats no draw.
    """

    def __init__(self, space: SearchSpace, config: Config, metrics: Sequence[str], modes: Sequence[str]) -> None:
        """Search the space for the best of the metrics."""
        self._space, self._config, self._metrics = space, config, list(metrics)
        self._directions = ["minimize" if mode == "min" else "maximize" for mode in modes]

    def __len__(self) -> int:
        """Count the trials."""
        return self._config.sweep.trials

    def ask(self, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Propose the values of the trial `index`."""
        return self._propose(
            index, [made for trial in trials if (made := self._told(trial)) is not None], STARTUP_TRIALS
        )

    def _propose(self, index: int, told: list[Any], startup: int) -> dict[str, Any]:
        optuna = quiet_optuna()
        sampler = optuna.samplers.TPESampler(seed=_seed(self._config.seed, index), n_startup_trials=startup)
        study = optuna.create_study(directions=self._directions, sampler=sampler)
        study.add_trials(told)
        asked, params = study.ask(), dict[str, Any]()
        for key, domain in self._space.items():
            if domain.applies(params, self._config):
                params[key] = suggest(asked, key, domain)
        return params

    def _told(self, trial: Trial) -> Any:
        """Turn a record into Optuna's; None for one that says nothing."""
        states = quiet_optuna().trial.TrialState
        if trial.state == "running":
            return self._made(trial, states.RUNNING)
        values = [trial.value, *(trial.others.get(name) for name in self._metrics[1:])]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if trial.state == "finished" and len(known) == len(self._metrics):
            return self._made(trial, states.COMPLETE, values=known)
        if trial.state in ("stopped early", PAUSED) and len(self._metrics) == 1:
            return self._made(trial, states.PRUNED, intermediate_values=dict(trial.curve))
        return self._made(trial, states.FAIL)

    def _made(self, trial: Trial, state: Any, **figures: Any) -> Any:
        distributions = {key: distribution(self._space[key]) for key in trial.params}
        return quiet_optuna().trial.create_trial(
            state=state, params=trial.params, distributions=distributions, **figures
        )


class BohbSearcher(TpeSearcher):
    """TPE by the results at the largest number of steps that enough trials have come to (Falkner et al. 2018, BOHB).

    https://arxiv.org/abs/1807.01774, section 4.1: a model needs the space's dimensions + 2 results; a third of the trials
    are drawn at random whatever the model says. HyperBand, which decides on the steps, is the scheduler's part.
    """

    def __init__(self, space: SearchSpace, config: Config, metric: str, mode: str, rungs: Sequence[int]) -> None:
        """Model the results at the `rungs` (steps) and at the end."""
        super().__init__(space, config, [metric], [mode])
        self._budgets = [*rungs, config.train.max_steps]

    def ask(self, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Propose the values of the trial `index`."""
        least = len(self._space) + 2
        if random.Random(_seed(self._config.seed, index)).random() < RANDOM_FRACTION:
            return self._propose(index, [], startup=1)
        results = results_at(trials, self._budgets)
        budget = max((b for b in self._budgets if len(results[b]) >= least), default=None)
        complete = quiet_optuna().trial.TrialState.COMPLETE
        found = results[budget] if budget else []
        return self._propose(index, [self._made(trial, complete, value=v) for trial, v in found], startup=least)


def results_at(trials: Sequence[Trial], budgets: Sequence[int]) -> dict[int, list[tuple[Trial, float]]]:
    """Return, for each number of steps, the trials that have come to it, with the first figure that they had then."""
    found: dict[int, list[tuple[Trial, float]]] = defaultdict(list)
    for trial in trials:
        for budget in budgets:
            if (value := next((v for step, v in trial.curve if step >= budget), None)) is not None:
                found[budget].append((trial, value))
    return found


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


def suggest(asked: Any, key: str, domain: Any) -> Any:
    """Have an Optuna trial choose a key's value."""
    if domain.listed:
        return asked.suggest_categorical(key, list(domain.values))
    low, high = domain.values
    if domain.kind == "randint":
        return asked.suggest_int(key, low, high - 1)
    return asked.suggest_float(key, low, high, log=domain.kind == "loguniform")


def distribution(domain: Any) -> Any:
    """Return a domain as Optuna's distribution."""
    distributions = quiet_optuna().distributions
    if domain.listed:
        return distributions.CategoricalDistribution(domain.values)
    low, high = domain.values
    if domain.kind == "randint":
        return distributions.IntDistribution(low, high - 1)
    return distributions.FloatDistribution(low, high, log=domain.kind == "loguniform")


def quiet_optuna() -> Any:
    """Import Optuna, which takes most of a second, and keep it from telling of each trial."""
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _seed(seed: int, index: int) -> int:
    return (seed * 1_000_003 + index) % 2**32


def importances(space: SearchSpace, trials: Sequence[Trial], mode: str) -> dict[str, float]:
    """Return each key's share of the differences between trials, the greatest first; nothing where too few trials tell.

    By fANOVA (Hutter et al. 2014) over the keys that every trial has, or where some apply to a part of the trials only by
    conditional PED-ANOVA (Watanabe et al. 2023), both Optuna's; a trial that was stopped early counts with its last figure.
    """
    told = [t for t in trials if t.value is not None and math.isfinite(t.value) and set(t.params) <= set(space)]
    keys = {key for t in told for key in t.params}
    if len(told) < 4 or len({t.value for t in told}) < 2 or not keys:
        return {}
    optuna = quiet_optuna()
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    for t in told:
        distributions = {key: distribution(space[key]) for key in t.params}
        study.add_trial(optuna.trial.create_trial(params=t.params, distributions=distributions, value=t.value))
    everywhere = all(set(t.params) == keys for t in told)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0) if everywhere else None
    found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {
        key: float(value) for key, value in sorted(found.items(), key=lambda item: -item[1]) if math.isfinite(value)
    }

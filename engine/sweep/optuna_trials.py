"""Optuna as the searchers use it: domains as distributions, suggestions, and the importance of params."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

from engine.sweep.search_space import SearchSpace
from engine.sweep.trial_record import Trial


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

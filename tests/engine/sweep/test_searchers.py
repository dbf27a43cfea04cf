"""The searchers on a synthetic function: they learn, and suggest the same params after a restart."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.config import Config, with_values
from engine.sweep.list_searcher import ListSearcher
from engine.sweep.optuna_trials import importances
from engine.sweep.search_space import SearchSpace, parse_search_space
from engine.sweep.searchers import make_searcher
from engine.sweep.searchers.bohb import BohbSearcher, results_at
from engine.sweep.searchers.tpe import TpeSearcher
from engine.sweep.trial_record import Trial, pareto_front

SPACE = {
    "optim.lr": {"loguniform": [1e-5, 1.0]},
    "optim.name": {"choice": ["adamw", "muon"]},
    "optim.momentum": {"uniform": [0.5, 0.99], "when": {"optim.name": "muon"}},
    "schedule.warmup_steps": {"randint": [1, 5]},
}


def loss(params: dict[str, Any], steps: float = math.inf) -> float:
    """Return a loss that is smallest at lr=1e-3 with muon at momentum 0.9, and falls with the steps."""
    distance = (math.log10(params["optim.lr"]) + 3) ** 2 + (params["optim.name"] != "muon")
    return distance + abs(params.get("optim.momentum", 0.9) - 0.9) + 1 / steps


def ended(index: int, params: dict[str, Any], state: str = "finished") -> Trial:
    curve = [(step, loss(params, step)) for step in ((2, 6, 18) if state == "finished" else (2,))]
    return Trial(index, f"s-{index}", params, 18, curve[-1][0], curve[-1][1], state=state, curve=curve)


def configured(tiny: Config, searcher: str) -> tuple[Config, SearchSpace]:
    scheduler = "hyperband" if searcher == "bohb" else "asha"
    values = {"sweep.space": SPACE, "sweep.trials": 40, "sweep.searcher": searcher, "sweep.scheduler": scheduler,
              "train.max_steps": 18}  # fmt: skip
    config = with_values(tiny, values)
    return config, parse_search_space(config)


@pytest.mark.parametrize(
    ("kind", "searcher_class"), [("random", ListSearcher), ("tpe", TpeSearcher), ("bohb", BohbSearcher)]
)
def test_a_searcher_learns_and_resumes_after_a_restart(tiny: Config, kind: str, searcher_class: type) -> None:
    config, space = configured(tiny, kind)

    def searcher() -> Any:
        return make_searcher(space, config, ["loss"], ["min"], [2, 6])

    first, trials = searcher(), []
    assert type(first) is searcher_class
    for index in range(len(first)):
        params = first.suggest_params(index, trials)
        assert with_values(config, params)
        assert ("optim.momentum" in params) == (params["optim.name"] == "muon")
        trials.append(ended(index, params, "finished" if index % 4 == 0 or kind == "tpe" else "stopped early"))
    assert len(trials) == 40
    if kind != "random":
        late = [loss(trial.params) for trial in trials[25:]]
        early = [loss(trial.params) for trial in trials[:10]]
        part, share = (2, 0.5) if kind == "tpe" else (4, 0.8)  # a third of BOHB's are random
        assert sorted(late)[len(late) // part] < share * sorted(early)[len(early) // part]
    for index in (0, 3, 20):  # as in another process, with the same records
        assert searcher().suggest_params(index, trials[:index]) == trials[index].params


def test_tpe_optimizes_several_metrics(tiny: Config) -> None:
    config, space = configured(tiny, "tpe")
    searcher, trials = TpeSearcher(space, config, ["loss", "size"], ["min", "max"]), []
    for index in range(30):
        trial = ended(index, searcher.suggest_params(index, trials))
        trial.others = {"size": trial.params["optim.lr"]}
        trials.append(trial)
    best = pareto_front(trials, ["loss", "size"], ["min", "max"])
    assert best[0].value == min(trial.value or 0 for trial in trials)
    assert [t.others["size"] for t in best] == sorted(t.others["size"] for t in best)
    assert len(best) > 2


def test_trial_states_map_to_optuna_states(tiny: Config) -> None:
    config, space = configured(tiny, "tpe")
    searcher = TpeSearcher(space, config, ["loss"], ["min"])
    params = {"optim.lr": 0.1, "optim.name": "adamw", "schedule.warmup_steps": 2}
    states = ("finished", "stopped early", "failed", "refused", "running")
    converted = [searcher._to_optuna(ended(i, params, state)) for i, state in enumerate(states)]
    assert [trial.state.name for trial in converted] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "RUNNING"]
    assert searcher.suggest_params(5, [ended(i, params, state) for i, state in enumerate(states)])


def test_bohb_models_the_largest_budget_with_enough_results(tiny: Config) -> None:
    params = {"optim.lr": 0.1, "optim.name": "adamw", "schedule.warmup_steps": 2}
    trials = [ended(0, params), ended(1, params, "stopped early")]
    results = results_at(trials, [2, 6, 18])
    assert {budget: [trial.index for trial, _ in pairs] for budget, pairs in results.items()} == {
        2: [0, 1],
        6: [0],
        18: [0],
    }
    assert results[6][0][1] == loss(params, 6)


def test_the_most_important_param_is_found(tiny: Config) -> None:
    config, space = configured(tiny, "random")
    searcher = make_searcher(space, config, ["loss"], ["min"], [])
    trials = [ended(i, searcher.suggest_params(i, [])) for i in range(40)]
    shares = importances(space, trials, "min")
    assert next(iter(shares)) == "optim.lr"
    assert sum(shares.values()) == pytest.approx(1)
    without_conditions = [
        Trial(t.index, t.name, {k: t.params[k] for k in ("optim.lr", "schedule.warmup_steps")}, value=t.value)
        for t in trials
    ]
    shares = importances(space, without_conditions, "min")
    assert shares["optim.lr"] > 0.7
    assert importances(space, without_conditions[:3], "min") == {}

"""Search spaces: invalid ones are refused before a trial starts; samples depend only on seed and index."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.sweep.search_space import grid_params, num_trials, parse_search_space, random_params, sample_params

SPACE = {"optim.lr": {"loguniform": [1e-3, 1e-2]}, "train.global_batch": {"choice": [8, 16]}}
MOMENTUM = {
    "optim.name": {"choice": ["adamw", "muon"]},
    "optim.momentum": {"uniform": [0.8, 0.99], "when": {"optim.name": "muon"}},
}


def of(tiny: Config, space: dict[str, Any], **sweep: Any) -> Config:
    return with_values(tiny, {"sweep.space": space, **{f"sweep.{key}": value for key, value in sweep.items()}})


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "sweep.space is empty"),
        ({"optim.lrr": {"uniform": [0.1, 0.2]}}, "optim.lrr is not an option; did you mean 'optim.lr'"),
        ({"optim.lr": {"normal": [0, 1]}}, "normal is not one of"),
        ({"optim.lr": {"loguniform": [0.1, 0.01]}}, "low first"),
        ({"optim.lr": {"uniform": [-1, 1]}}, "optim.lr=-1 is too small"),
        ({"optim.lr": 3}, "is not a domain"),
        ({"train.precision": {"choice": ["bf16", "fp8"]}}, "train.precision=fp8 is not one of"),
        ({"train.global_batch": {"uniform": [8, 16]}}, "samples fractions, and this is an integer"),
        ({"train.global_batch": {"choice": ["many"]}}, "many is not an integer"),
        ({"optim.lr": {"randint": [0.5, 2]}}, "randint takes integers"),
        ({"sweep.trials": {"choice": [1, 2]}}, "the same for all trials"),
        ({"train.max_steps": {"choice": [1, 2]}}, "the same for all trials"),
        ({"optim.momentum": {"uniform": [0.8, 0.9], "when": {"optim.nam": "muon"}}}, "optim.nam is not an option"),
        (
            {"optim.momentum": {"uniform": [0.8, 0.9], "when": {"optim.name": "muon"}}},
            "is never active: optim.name is adamw",
        ),
        ({"optim.momentum": {"uniform": [0.8, 0.9], "when": "muon"}}, "is not a condition"),
        (
            {**MOMENTUM, "optim.name": {"choice": ["adamw"]}},
            "is never active with optim.name=muon: that is not in the list of optim.name",
        ),
        (
            {**MOMENTUM, "optim.name": {"choice": ["adamw", "muon"], "when": {"optim.momentum": 0.9}}},
            "are circular",
        ),
    ],
)
def test_an_invalid_space_is_refused_with_a_reason(tiny: Config, space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_search_space(of(tiny, space))


@pytest.mark.parametrize(
    ("space", "sweep", "message"),
    [
        (SPACE, {"searcher": "grid"}, "loguniform has infinitely many values"),
        ({"optim.lr": {"grid": [1e-3, 1e-2]}}, {"searcher": "tpe"}, "takes no grid: use choice"),
        ({"model.hidden_size": {"choice": [32, 64]}}, {"scheduler": "pbt"}, "cannot be changed then"),
        ({"train.global_batch": {"choice": [8, 16]}}, {"scheduler": "pb2"}, "choices only: use sweep.scheduler=pbt"),
        (SPACE, {"searcher": "bohb"}, "use sweep.scheduler=hyperband"),
        (SPACE, {"searcher": "tpe", "scheduler": "pbt"}, "leave out sweep.searcher"),
        (SPACE, {"metric": "accuracy+loss"}, "give min or max for each"),
        (SPACE, {"mode": "most"}, "'most' is not one of min, max"),
        (SPACE, {"soup": 2, "retrain_steps": 9}, "use one of them"),
    ],
)
def test_an_unsupported_combination_is_refused_with_a_reason(
    tiny: Config, space: dict[str, Any], sweep: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_search_space(of(tiny, space, **sweep))


def test_nested_keys_equal_dotted_keys(tiny: Config) -> None:
    nested = {"optim": {"lr": {"loguniform": [1e-3, 1e-2]}}, "train.global_batch": {"choice": [8, 16]}}
    assert parse_search_space(of(tiny, nested)) == parse_search_space(of(tiny, SPACE))


def test_a_sample_depends_only_on_seed_and_index(tiny: Config) -> None:
    config = of(tiny, SPACE, trials=50)
    space = parse_search_space(config)
    trials = random_params(space, config, seed=3)
    assert trials[7] == sample_params(space, config, 3, 7)
    assert len({params["optim.lr"] for params in trials}) == 50
    assert all(1e-3 <= params["optim.lr"] <= 1e-2 for params in trials)
    assert {params["train.global_batch"] for params in trials} == {8, 16}
    assert random_params(space, config, seed=4)[7] != trials[7]
    wider = of(tiny, {**SPACE, "optim.beta1": {"uniform": [0.8, 0.9]}}, trials=50)
    assert [p | {"optim.beta1": 0} for p in random_params(parse_search_space(wider), wider, 3)] == [
        p | {"optim.beta1": 0} for p in trials
    ]


def test_a_key_is_sampled_only_if_its_condition_holds(tiny: Config) -> None:
    config = of(tiny, dict(reversed(MOMENTUM.items())), trials=40)
    space = parse_search_space(config)
    assert list(space) == ["optim.name", "optim.momentum"]
    for params in random_params(space, config, 0):
        assert ("optim.momentum" in params) == (params["optim.name"] == "muon")
        assert with_values(config, params).optim.momentum == params.get("optim.momentum", 0.95)


def test_grid_search_has_every_combination_once(tiny: Config) -> None:
    config = of(
        tiny,
        {"optim.name": {"choice": ["adamw", "muon"]}, "optim.lr": {"grid": [1e-3, 1e-2]},
         "optim.momentum": {"choice": [0.8, 0.9], "when": {"optim.name": "muon"}}},
        searcher="grid", trials=1,
    )  # fmt: skip
    trials = grid_params(parse_search_space(config), config)
    assert len(trials) == 2 + 4 == num_trials(parse_search_space(config), config)
    assert {"optim.name": "adamw", "optim.lr": 1e-2} in trials


def test_random_samples_are_combined_with_every_grid_value(tiny: Config) -> None:
    config = of(tiny, {"optim.lr": {"grid": [1e-3, 1e-2]}, "optim.beta1": {"uniform": [0.8, 0.9]}}, trials=3)
    space = parse_search_space(config)
    trials = random_params(space, config, 0)
    assert len(trials) == 6 == num_trials(space, config)
    assert [params["optim.lr"] for params in trials] == [1e-3, 1e-2] * 3


def test_to_unit_is_the_inverse_of_value_at(tiny: Config) -> None:
    config = of(tiny, {**SPACE, "optim.beta1": {"uniform": [0.8, 0.9]}, "schedule.warmup_steps": {"randint": [1, 5]}})
    for domain in parse_search_space(config).values():
        for position in (0.0, 0.3, 0.99):
            value = domain.value_at(position)
            assert domain.value_at(domain.to_unit(value)) == pytest.approx(value)

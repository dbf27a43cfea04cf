"""Search spaces: what no trial could take is refused before any starts; what is drawn depends on seed and index alone."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.sweep.search_space import parse_search_space, grid_params, num_trials, sample_params, random_params

SPACE = {"optim.lr": {"loguniform": [1e-3, 1e-2]}, "train.global_batch": {"choice": [8, 16]}}
MOMENTUM = {
    "optim.name": {"choice": ["adamw", "muon"]},
    "optim.momentum": {"uniform": [0.8, 0.99], "when": {"optim.name": "muon"}},
}


def of(tiny: Config, space: dict[str, Any], **sweep: Any) -> Config:
    return with_values(tiny, {"sweep.space": space, **{f"sweep.{key}": value for key, value in sweep.items()}})


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "sweep.space is empty"),
        ({"optim.lrr": {"uniform": [0.1, 0.2]}}, "optim.lrr is not an option; did you mean 'optim.lr'"),
        ({"optim.lr": {"normal": [0, 1]}}, "normal is not one of"),
        ({"optim.lr": {"loguniform": [0.1, 0.01]}}, "low first"),
        ({"optim.lr": {"uniform": [-1, 1]}}, "optim.lr=-1 is too small"),
        ({"optim.lr": 3}, "is no domain"),
        ({"train.precision": {"choice": ["bf16", "fp8"]}}, "train.precision=fp8 is not one of"),
        ({"train.global_batch": {"uniform": [8, 16]}}, "draws fractions, and this is an integer"),
        ({"train.global_batch": {"choice": ["many"]}}, "many is not an integer"),
        ({"optim.lr": {"randint": [0.5, 2]}}, "randint takes integers"),
        ({"sweep.trials": {"choice": [1, 2]}}, "the same for all trials"),
        ({"train.max_steps": {"choice": [1, 2]}}, "the same for all trials"),
        ({"optim.momentum": {"uniform": [0.8, 0.9], "when": {"optim.nam": "muon"}}}, "optim.nam is not an option"),
        (
            {"optim.momentum": {"uniform": [0.8, 0.9], "when": {"optim.name": "muon"}}},
            "never applies: optim.name is adamw",
        ),
        ({"optim.momentum": {"uniform": [0.8, 0.9], "when": "muon"}}, "is no condition"),
        (
            {**MOMENTUM, "optim.name": {"choice": ["adamw"]}},
            "never applies with optim.name=muon: that is not in its own list",
        ),
        (
            {**MOMENTUM, "optim.name": {"choice": ["adamw", "muon"], "when": {"optim.momentum": 0.9}}},
            "wait for each other",
        ),
    ],
)
def test_a_wrong_space_is_one_sentence(tiny: Config, space: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_search_space(of(tiny, space))


@pytest.mark.parametrize(
    ("space", "sweep", "said"),
    [
        (SPACE, {"searcher": "grid"}, "loguniform has no end of values"),
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
def test_a_search_that_cannot_be_is_one_sentence(
    tiny: Config, space: dict[str, Any], sweep: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        parse_search_space(of(tiny, space, **sweep))


def test_nested_keys_are_the_same_as_dotted_ones(tiny: Config) -> None:
    nested = {"optim": {"lr": {"loguniform": [1e-3, 1e-2]}}, "train.global_batch": {"choice": [8, 16]}}
    assert parse_search_space(of(tiny, nested)) == parse_search_space(of(tiny, SPACE))


def test_a_draw_depends_on_seed_and_index_alone(tiny: Config) -> None:
    config = of(tiny, SPACE, trials=50)
    space = parse_search_space(config)
    found = random_params(space, config, seed=3)
    assert found[7] == sample_params(space, config, 3, 7)
    assert len({params["optim.lr"] for params in found}) == 50
    assert all(1e-3 <= params["optim.lr"] <= 1e-2 for params in found)
    assert {params["train.global_batch"] for params in found} == {8, 16}
    assert random_params(space, config, seed=4)[7] != found[7]
    wider = of(tiny, {**SPACE, "optim.beta1": {"uniform": [0.8, 0.9]}}, trials=50)
    assert [p | {"optim.beta1": 0} for p in random_params(parse_search_space(wider), wider, 3)] == [
        p | {"optim.beta1": 0} for p in found
    ]


def test_a_key_is_drawn_only_where_its_condition_holds(tiny: Config) -> None:
    config = of(tiny, dict(reversed(MOMENTUM.items())), trials=40)
    space = parse_search_space(config)
    assert list(space) == ["optim.name", "optim.momentum"]
    for params in random_params(space, config, 0):
        assert ("optim.momentum" in params) == (params["optim.name"] == "muon")
        assert with_values(config, params).optim.momentum == params.get("optim.momentum", 0.95)


def test_a_grid_has_every_combination_once(tiny: Config) -> None:
    config = of(
        tiny,
        {"optim.name": {"choice": ["adamw", "muon"]}, "optim.lr": {"grid": [1e-3, 1e-2]},
         "optim.momentum": {"choice": [0.8, 0.9], "when": {"optim.name": "muon"}}},
        searcher="grid", trials=1,
    )  # fmt: skip
    found = grid_params(parse_search_space(config), config)
    assert len(found) == 2 + 4 == num_trials(parse_search_space(config), config)
    assert {"optim.name": "adamw", "optim.lr": 1e-2} in found


def test_drawn_values_are_tried_under_every_combination_of_the_grids(tiny: Config) -> None:
    config = of(tiny, {"optim.lr": {"grid": [1e-3, 1e-2]}, "optim.beta1": {"uniform": [0.8, 0.9]}}, trials=3)
    space = parse_search_space(config)
    found = random_params(space, config, 0)
    assert len(found) == 6 == num_trials(space, config)
    assert [params["optim.lr"] for params in found] == [1e-3, 1e-2] * 3


def test_a_place_is_the_inverse_of_a_value(tiny: Config) -> None:
    config = of(tiny, {**SPACE, "optim.beta1": {"uniform": [0.8, 0.9]}, "schedule.warmup_steps": {"randint": [1, 5]}})
    for domain in parse_search_space(config).values():
        for place in (0.0, 0.3, 0.99):
            value = domain.at(place)
            assert domain.at(domain.place(value)) == pytest.approx(value)

"""Stopping rules, on synthetic reports."""

from __future__ import annotations

from engine.config import Config, with_values
from engine.sweep.stopping import MedianStoppingRule, StoppingRule, make_stopping_rule, rungs


def test_the_median_rule_compares_with_the_means_of_trials_at_the_same_step() -> None:
    rule = MedianStoppingRule("min", grace_steps=2)
    for index, loss in enumerate((1.0, 2.0, 3.0)):
        assert not rule.should_stop(index, 1, loss + 1)
        assert not rule.should_stop(index, 2, loss)
    assert not rule.should_stop(3, 1, 9.0)  # within the grace period
    assert rule.should_stop(3, 2, 9.0)  # its best, 9, is above the median of 1.5, 2.5 and 3.5
    assert not rule.should_stop(4, 2, 2.4)
    assert not rule.should_stop(4, 3, 9.0)  # no other trial has reached step 3


def test_the_config_selects_the_rule(tiny: Config) -> None:
    config = with_values(tiny, {"train.max_steps": 27, "sweep.reduction_factor": 3})
    assert rungs(config) == [3, 9]
    assert rungs(with_values(config, {"sweep.grace_steps": 1})) == [1, 3, 9]
    rules = {"median": MedianStoppingRule, "none": StoppingRule}
    for name, rule in rules.items():
        assert type(make_stopping_rule(with_values(config, {"sweep.scheduler": name}), "min")) is rule

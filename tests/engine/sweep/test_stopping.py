"""The rules that stop trials, on made-up reports."""

from __future__ import annotations

import random

from engine.config import Config, with_values
from engine.sweep.stopping import Asha, Median, Rule, make_rule, rungs


def test_asha_lets_one_in_so_many_go_on() -> None:
    rule = Asha("min", rungs=[1, 3], reduction=3)
    losses = [5.0, 4.0, 6.0, 3.0, 4.5, 2.0]
    assert [rule.stops(i, 1, loss) for i, loss in enumerate(losses)] == [False, False, True, False, True, False]
    assert not rule.stops(0, 2, 9.9)  # no rung lies between its reports
    assert not rule.stops(5, 3, 2.0)  # the first at its rung
    assert rule.stops(3, 4, 2.5)  # judged at rung 3, which it passed between two reports
    assert not rule.stops(3, 4, 2.5)  # once for each rung


def test_asha_goes_by_the_mode() -> None:
    rule = Asha("max", rungs=[1], reduction=2)
    assert [rule.stops(i, 1, accuracy) for i, accuracy in enumerate([0.5, 0.4, 0.6])] == [False, True, False]


def test_asha_on_many_trials_spends_a_fraction_and_keeps_a_good_one() -> None:
    draw, steps = random.Random(0), 64
    qualities = [draw.random() for _ in range(64)]
    rule = Asha("min", rungs=[2, 8, 32], reduction=4)
    taken, ended = 0, []
    for index, quality in enumerate(qualities):
        for step in range(1, steps + 1):
            if rule.stops(index, step, quality + 1 / step) and step < steps:
                break
        taken += step
        ended += [quality] if step == steps else []
    assert taken < 0.2 * steps * len(qualities)
    assert min(ended) == min(qualities)


def test_hyperband_s_brackets_begin_one_rung_later_each() -> None:
    rule = Asha("min", rungs=[1, 3], reduction=3, brackets=3)
    assert not rule.stops(0, 1, 1.0)
    assert rule.stops(3, 1, 2.0)  # the same bracket
    assert not rule.stops(1, 1, 9.0)  # the second begins at rung 3
    assert not rule.stops(1, 3, 9.0)
    assert rule.stops(4, 3, 9.5)
    assert not rule.stops(2, 1, 99.0)  # the third stops none
    assert not rule.stops(2, 3, 99.0)


def test_the_median_rule_compares_means_of_trials_that_came_as_far() -> None:
    rule = Median("min", grace=2)
    for index, loss in enumerate((1.0, 2.0, 3.0)):
        assert not rule.stops(index, 1, loss + 1)
        assert not rule.stops(index, 2, loss)
    assert not rule.stops(3, 1, 9.0)  # within its grace
    assert rule.stops(3, 2, 9.0)  # its best, 9, is above the median of 1.5, 2.5 and 3.5
    assert not rule.stops(4, 2, 2.4)
    assert not rule.stops(4, 3, 9.0)  # nobody else has come as far


def test_a_config_chooses_its_rule(tiny: Config) -> None:
    config = with_values(tiny, {"train.max_steps": 27, "sweep.reduction": 3})
    assert rungs(config) == [3, 9]
    assert rungs(with_values(config, {"sweep.grace_steps": 1})) == [1, 3, 9]
    kinds = {"asha": Asha, "hyperband": Asha, "median": Median, "none": Rule, "pbt": Rule}
    for name, kind in kinds.items():
        assert type(make_rule(with_values(config, {"sweep.scheduler": name}), "min")) is kind

"""Learning rate schedules."""

from __future__ import annotations

import pytest

from engine.config import Config, declared, with_values
from engine.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + 2**-0.5), 0.55, 0.1 + 0.45 * (1 - 2**-0.5), 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1]),
    ],
)
def test_learning_rates_of_each_schedule(kind: str, rates: list[float]) -> None:
    values = {"schedule.kind": kind, "schedule.warmup_steps": 2, "train.max_steps": 7, "optim.lr": 1.0}
    config = with_values(Config(), values | {"schedule.decay_fraction": 0.5})
    assert [learning_rate(config, step) for step in range(7)] == pytest.approx(rates)
    assert learning_rate(config, 100) == pytest.approx(rates[-1])


def test_the_choices_are_the_files_of_the_folder() -> None:
    choices = next(field.metadata["choices"] for key, field, _ in declared() if key == "schedule.kind")
    assert choices == ("constant", "cosine", "linear", "wsd")

"""Configs from other configs and from dicts, their derived values and their hash."""

from __future__ import annotations

import dataclasses

import pytest

from engine.config import Config, fingerprint, from_dict, replace, to_dict, with_values
from jobs.entry import compose


def test_a_resolved_config_is_closed() -> None:
    config = compose("pretrain", [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.max_steps = 3  # type: ignore[misc]
    assert replace(config, train__max_steps=3).train.max_steps == 3


def test_derived_values() -> None:
    config = with_values(Config(), {"train.global_batch": 30, "train.workers": 4, "train.max_steps": 200})
    assert (config.micro_batch, config.total_steps, config.warmup_steps) == (8, 200, 20)


def test_the_fingerprint_depends_on_what_is_computed_not_on_where() -> None:
    config = Config()
    on_a_cluster = with_values(
        config, {"train.workers": 4, "zero.stage": 3, "name": "other", "cluster.address": "auto", "train.max_steps": 7}
    )
    assert fingerprint(config) == fingerprint(on_a_cluster)
    assert fingerprint(config) != fingerprint(with_values(config, {"optim.lr": 2e-3}))


def test_a_config_is_equal_after_conversion_to_a_dict_and_back() -> None:
    config = compose("sweep", [])
    assert from_dict(to_dict(config)) == config

"""Every mistake ends in one sentence that names the key and the fix."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, check, config_groups, declared, fingerprint, from_dict, replace, to_dict, with_values
from engine.errors import UserError
from jobs.entry import compose

JOBS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf").glob("*.yaml"))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"train.micro_batch": 16, "train.global_batch": 8},
            "train.micro_batch 16 is more than train.global_batch 8: use train.micro_batch=8 or less",
        ),
        (
            {"data.sequence_length": 4096, "model.max_position_embeddings": 1024},
            "sequence length 4,096 is over the model's 1,024 positions: use data.sequence_length=1024",
        ),
        ({"model.hidden_size": 30, "model.num_attention_heads": 4}, "use a multiple of 4"),
        ({"model.num_attention_heads": 8, "model.num_key_value_heads": 3}, "use a divisor of 8"),
        ({"zero.stage": 4}, "zero.stage=4 is too large: use 3 or less"),
        ({"zero.stage": 2, "zero.offload_param": "cpu"}, "zero.offload_param needs zero.stage=3"),
        ({"train.max_steps": 0}, "train.max_steps=0 is too small: use 1 or more"),
        ({"optim.lr": 0.0}, "optim.lr=0.0 is too small: use more than 0"),
        ({"optim.lr": float("nan")}, "not a finite number"),
        ({"train.precision": "bf61"}, "did you mean 'bf16'?"),
        ({"schedule.warmup_steps": 50, "train.max_steps": 10}, "use schedule.warmup_steps=10 or less"),
        ({"schedule.total_steps": 5, "train.max_steps": 10}, "use schedule.total_steps=10 or more"),
        ({"name": "a/b"}, "cannot name a folder"),
        ({"data.validation_fraction": 0.5, "data.test_fraction": 0.5}, "leave nothing to train on"),
        ({"serve.min_replicas": 3, "serve.max_replicas": 1}, "use serve.max_replicas=3 or more"),
        ({"serve.canary_stages": [0.5, 0.25, 1.0]}, "must be growing shares of the traffic that end with all of it"),
        ({"serve.canary_stages": [0.5]}, "must be growing shares of the traffic that end with all of it"),
        ({"serve.names": "a+b", "bundle": "one"}, "serve.names=a+b is not one name for each of bundle=one"),
        ({"serve.tracing": "localhost:4318"}, "use http://localhost:4318"),
        ({"serve.tracing": "http://me:secret@collector"}, "serve.tracing has a password in it"),
        (
            {"serve.adapters": {"x": "f"}, "bundle": "a+b"},
            "serve.adapters are of one bundle, and bundle=a+b are several",
        ),
        ({"serve.adapters": {"x:y": "f"}}, "serve.adapters.x:y=f is no adapter: write NAME: FOLDER"),
        ({"objective.name": "classification", "data.path": "x.jsonl"}, "data.label_column"),
        ({"optim.lrr": 1.0}, "optim.lrr is not an option; did you mean 'optim.lr'?"),
    ],
)
def test_a_contradiction_is_told_with_its_fix(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        with_values(Config(), values)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_option_says_what_it_means() -> None:
    for key, field, _ in declared():
        assert field.metadata.get("help"), key


def test_a_resolved_config_is_closed() -> None:
    config = compose("pretrain", [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.max_steps = 3  # type: ignore[misc]
    assert replace(config, train__max_steps=3).train.max_steps == 3


def test_derived_values() -> None:
    config = with_values(Config(), {"train.global_batch": 30, "train.workers": 4, "train.max_steps": 200})
    assert (config.micro_batch, config.total_steps, config.warmup_steps) == (8, 200, 20)


def test_the_fingerprint_is_of_what_is_computed_and_not_of_where() -> None:
    config = Config()
    elsewhere = with_values(
        config, {"train.workers": 4, "zero.stage": 3, "name": "other", "cluster.address": "auto", "train.max_steps": 7}
    )
    assert fingerprint(config) == fingerprint(elsewhere)
    assert fingerprint(config) != fingerprint(with_values(config, {"optim.lr": 2e-3}))


def test_a_config_survives_the_way_through_a_dict() -> None:
    config = compose("sweep", [])
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("job", JOBS)
def test_every_job_composes(job: str) -> None:
    check(compose(job, []))


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group, names in config_groups() if group != "experiment" for name in names]
)
def test_every_group_file_composes(choice: str) -> None:
    check(compose("pretrain", [choice]))


@pytest.mark.parametrize("name", dict(config_groups())["experiment"])
def test_every_experiment_composes_and_so_do_its_stages(name: str) -> None:
    config = compose("demo", [f"experiment={name}"])
    check(compose("pretrain", config.demo.pretrain))
    check(compose("sweep", config.demo.sweep))

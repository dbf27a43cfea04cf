"""A mistake in a config ends in one sentence that names the option and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import Config, with_values
from engine.errors import UserError


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
        ({"serve.adapters": {"x:y": "f"}}, "serve.adapters.x:y=f is not an adapter: write NAME: FOLDER"),
        ({"objective.name": "classification", "data.path": "x.jsonl"}, "data.label_column"),
        ({"optim.lrr": 1.0}, "optim.lrr is not an option; did you mean 'optim.lr'?"),
    ],
)
def test_an_invalid_config_is_refused_with_its_fix(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        with_values(Config(), values)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)

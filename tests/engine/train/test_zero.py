"""The DeepSpeed config that a run derives, and the check of zero.options."""

from __future__ import annotations

import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.train.zero import NO_CLIP, check_options, deepspeed_config


def test_the_loop_owns_accumulation_and_the_loss_scale(tiny: Config) -> None:
    config = with_values(tiny, {"zero.stage": 2, "train.micro_batch": 4, "optim.clip": 0.0})
    derived = deepspeed_config(config, "fp16", parameters=1000)
    assert derived["train_micro_batch_size_per_gpu"] == 4
    assert derived["gradient_accumulation_steps"] == 1
    assert derived["gradient_clipping"] == NO_CLIP
    assert derived["fp16"] == {"enabled": True, "loss_scale": 1.0}
    assert derived["bf16"] == {"enabled": False}
    assert derived["zero_optimization"]["reduce_bucket_size"] == 1000


def test_offload_and_options_are_passed_on(tiny: Config) -> None:
    values = {"zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_param": "cpu"}
    zero = deepspeed_config(with_values(tiny, values), "bf16", 10**10)["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"], zero["offload_param"]) == (
        3,
        {"device": "cpu"},
        {"device": "cpu"},
    )
    assert zero["reduce_bucket_size"] == int(5e8)
    config = with_values(tiny, {"zero.options": {"reduce_bucket_size": 500}})
    assert deepspeed_config(config, "fp32", 1000)["zero_optimization"]["reduce_bucket_size"] == 500


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    check_options({"reduce_bucket_size": 1})
    with pytest.raises(UserError, match="is not an option of DeepSpeed's ZeRO config; did you mean 'reduce_bucket"):
        check_options({"reduce_bucket": 1})

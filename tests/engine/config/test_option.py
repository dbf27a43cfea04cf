"""Flags of options: which options decide a run's identity, the content of prepared data, memory, versions, ...

The expected names are those of the lists that the flags replaced (under former names).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from engine.config import (
    DEPLOYMENT,
    INGRESS,
    REPLICA,
    Config,
    DataConfig,
    ServeConfig,
    content_options,
    declared,
    flatten,
    keys_with,
    options_affecting,
    per_source_options,
    source_configs,
    with_values,
)
from engine.config.former_names import former_keys
from engine.config.option import Frozen, flag_values, option, option_group

NOT_IDENTITY = (
    "job", "name", "runs_dir", "resume", "profile", "cluster", "tracking", "serve", "demo", "zero", "evaluate", "card",
    "promote", "plan", "convert", "improve", "key",
    "train.workers", "train.gpus_per_worker", "train.cpus_per_worker", "train.micro_batch", "train.max_steps",
    "train.compile", "train.sequence_parallel", "train.activation_checkpointing", "train.checkpoint_every", "train.keep_checkpoints",
    "train.evaluate_every", "train.evaluate_samples", "train.max_failures", "train.max_skipped",
    "train.max_rollbacks", "train.on_failed_save", "train.hang_timeout_s", "train.min_workers", "train.resize_every_s",
    "train.spares",
    "data.store", "train.mirror", "train.keep_best", "train.patience", "objective.logits_chunk",
    "sweep.concurrent",
)  # fmt: skip
PER_SOURCE = (
    "source", "path", "validation_path", "test_path", "format", "text_column", "subset", "split", "validation_split",
    "test_split", "revision", "stream", "licence", "validation_fraction", "test_fraction", "max_documents", "mask",
    "min_characters", "max_characters", "quality", "languages", "filter",
)  # fmt: skip
NOT_CONTENT = (
    "name", "sequence_length", "tokenizer", "packing", "within_documents", "stream", "image_processor", "image_size",
    "feature_extractor", "audio_seconds", "store",
)  # fmt: skip
OF_A_DEPLOYMENT = (
    "names", "ready_timeout_s", "detach", "strategy", "canary_stages", "canary_requests", "canary_stage_s",
    "canary_false_alarm", "canary_error_margin", "canary_latency_margin", "shadow_share", "shadow_requests",
    "keep_warm_s", "export", "image",
)  # fmt: skip
OF_THE_INGRESS = (
    "host", "port", "max_body_bytes", "max_audio_bytes", "tries", "body_timeout_s", "keys_file", "open", "origins", "log_prompts",
    "records_dir", "haproxy", "ingresses",
)  # fmt: skip


def former(keys: tuple[str, ...]) -> list[str]:
    return [former_keys().get(key, key) for key in keys]


def test_every_option_has_a_help_text() -> None:
    for key, field, _ in declared():
        assert field.metadata.get("help"), key


def test_identity() -> None:
    expected = [
        key
        for key in former(tuple(flatten(Config())))
        if not any(key == skip or key.startswith(f"{skip}.") for skip in NOT_IDENTITY)
    ]
    assert former(keys_with("identity")) == expected


def test_options_of_a_source() -> None:
    assert former(tuple(f"data.{name}" for name in per_source_options())) == [f"data.{name}" for name in PER_SOURCE]


def test_options_that_decide_the_content_of_prepared_data() -> None:
    data = DataConfig(sources={"a": {"path": "x", "license": "MIT", "weight": 2.0, "stream": True}})
    expected = [key.removeprefix("data.") for key in former(tuple(f"data.{n}" for n in vars(DataConfig())))]
    options = content_options(data)
    assert list(options) == [name for name in expected if name not in NOT_CONTENT]
    assert options["sources"] == {"a": {"path": "x", "licence": "MIT"}}
    assert source_configs(data)["a"].license == "MIT"


def test_options_that_decide_how_many_samples_fit() -> None:
    assert list(keys_with("micro_batch")) == [
        key for key in flatten(Config())
        if key.startswith(("model.", "objective.", "zero.")) or key in (
            "data.sequence_length", "data.vocab_size", "data.tokenizer", "bundle", "optim.name", "train.ema",
            "train.precision", "train.compile", "train.sequence_parallel", "train.activation_checkpointing",
        )
    ]  # fmt: skip


def test_options_that_decide_the_number_of_parameters() -> None:
    keys = ("model.", "objective.", "optim.name", "bundle", "data.sequence_length", "data.vocab_size")
    assert list(keys_with("parameter_count")) == [key for key in flatten(Config()) if key.startswith(keys)]


def test_options_that_decide_the_start_weights() -> None:
    keys, unlike = ("seed", "objective.name", "model.", "data."), ("model.dropout", "model.attention")
    expected = [key for key in flatten(Config()) if key.startswith(keys) and key not in unlike]
    assert list(keys_with("start_weights")) == expected


def test_what_a_change_of_an_option_of_the_endpoint_replaces() -> None:
    options = ServeConfig()
    assert set(options_affecting(options, (DEPLOYMENT,))) == set(OF_A_DEPLOYMENT)
    assert set(options_affecting(options, (INGRESS,))) == set(OF_THE_INGRESS)
    replica = set(vars(options)) - set(OF_A_DEPLOYMENT) - set(OF_THE_INGRESS)
    assert set(options_affecting(options, (REPLICA,))) == replica


def test_an_option_without_a_required_flag_is_refused() -> None:
    @dataclass
    class Group(Frozen):
        width: int = option(1, "width")

    @dataclass
    class Root(Frozen):
        group: Group = option_group(Group)
        other: Group = option_group(Group, identity=True)

    Root.__annotations__ = {"group": Group, "other": Group}
    Group.__annotations__ = {"width": int}
    with pytest.raises(TypeError, match=r"option group\.width must state identity"):
        flag_values(Root, "identity")
    with pytest.raises(TypeError, match=r"option width must state affects"):
        flag_values(Group, "affects")


def test_the_config_of_a_source_has_no_sources() -> None:
    config = with_values(Config(), {"data.sources": {"a": {"path": "x"}}})
    assert source_configs(config.data)["a"].sources == {}

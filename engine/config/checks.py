"""What a config is refused for: values out of range, and options that contradict each other, each with its fix.

The checks of one group stand beside its options (`check` of its dataclass); here are those across groups.
"""

from __future__ import annotations

import dataclasses
import re

from engine.config.config import Config, declared
from engine.config.option import Frozen, check_range, get
from engine.errors import UserError


def check(config: Config) -> None:
    """Raise UserError for a value that is out of range or contradicts another one."""
    for key, f, _ in declared():
        value = get(config, key)
        if value is not None:
            check_range(key, f, value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise UserError(f"name='{config.name}' cannot name a folder: use letters, digits, '.', '_' and '-' only")
    for f in dataclasses.fields(config):
        options = getattr(config, f.name)
        if isinstance(options, Frozen):
            options.check()
    _check_batch(config)
    _check_schedule(config)
    _check_model(config)
    _check_packing(config)
    _check_serving(config)
    _check_job(config)


def _check_batch(c: Config) -> None:
    """Check that the sizes of a step and of a micro-batch agree with each other and with the sequence length."""
    train, length = c.train, c.data.sequence_length
    if train.global_batch_tokens is not None:
        if train.global_batch is not None:
            raise UserError(
                f"train.global_batch {train.global_batch} and train.global_batch_tokens {train.global_batch_tokens:,} "
                "both set the size of a step: use one of them"
            )
        if train.global_batch_tokens % length:
            near = max(1, round(train.global_batch_tokens / length)) * length
            raise UserError(
                f"train.global_batch_tokens {train.global_batch_tokens:,} is not a multiple of data.sequence_length {length:,}: "
                f"use train.global_batch_tokens={near}"
            )
    if train.micro_batch and train.micro_batch > c.global_batch:
        raise UserError(
            f"train.micro_batch {train.micro_batch} is more than train.global_batch {c.global_batch}: "
            f"use train.micro_batch={c.global_batch} or less"
        )


def _check_schedule(c: Config) -> None:
    """Check that the schedule covers the warm-up and all steps."""
    if c.warmup_steps > c.total_steps:
        raise UserError(
            f"schedule.warmup_steps {c.warmup_steps} is more than the schedule's {c.total_steps} steps: "
            f"use schedule.warmup_steps={c.total_steps} or less"
        )
    if c.schedule.total_steps and c.train.max_steps > c.schedule.total_steps:
        raise UserError(
            f"train.max_steps {c.train.max_steps} is more than schedule.total_steps {c.schedule.total_steps}: "
            f"use schedule.total_steps={c.train.max_steps} or more"
        )


def _check_model(c: Config) -> None:
    """Check that the model takes the samples, and that its attention works with sequence parallelism."""
    if c.train.sequence_parallel > 1 and c.model.attention != "sdpa":
        raise UserError(
            f"train.sequence_parallel has an attention of its own, based on sdpa: leave out model.attention={c.model.attention}"
        )
    if c.model.max_position_embeddings and c.data.sequence_length > c.model.max_position_embeddings:
        raise UserError(
            f"sequence length {c.data.sequence_length:,} is over the model's {c.model.max_position_embeddings:,} positions: "
            f"use data.sequence_length={c.model.max_position_embeddings}"
        )


def _check_packing(c: Config) -> None:
    """Check that the attention supports packed documents; `check_data` of engine/objectives checks that the objective does."""
    if c.data.within_documents and c.model.attention == "flash_attention_2":
        raise UserError(
            "data.within_documents needs an attention with a mask, and flash_attention_2 takes none: use model.attention=sdpa"
        )
    if c.data.within_documents and c.objective.name == "masked_lm" and c.model.attention != "sdpa":
        raise UserError(
            f"data.within_documents and objective=masked_lm need model.attention=sdpa, not {c.model.attention}"
        )


def _check_serving(c: Config) -> None:
    """Check that the options of an endpoint go with the bundles that it serves."""
    several = "+" in (c.bundle or "")
    if c.serve.names and len(c.serve.names.split("+")) != len((c.bundle or c.tracking.alias).split("+")):
        raise UserError(
            f"serve.names={c.serve.names} is not one name for each of bundle={c.bundle or c.tracking.alias}"
        )
    if c.serve.adapters and several:
        raise UserError(
            f"serve.adapters are of one bundle, and bundle={c.bundle} are several: deploy them one after the other, each with its own"
        )
    if c.serve.draft_model and several:
        raise UserError(
            f"serve.draft_model is for one bundle, and bundle={c.bundle} are several: deploy them one after the other, each with its own"
        )


def _check_job(c: Config) -> None:
    """Check what one job needs and others don't."""
    if c.job == "sweep":
        if c.train.mirror:
            raise UserError(
                "train.mirror copies one run, and a sweep has many: leave it out, and use it to train the best one"
            )
        if c.sweep.scheduler in ("pbt", "pb2") and c.sweep.trials < 2:
            raise UserError(f"sweep.scheduler={c.sweep.scheduler} needs a population: use sweep.trials=4 or more")
    if c.job in ("pretrain", "sweep") and c.objective.lora.rank and c.bundle is None:
        raise UserError("objective.lora adapts a trained model: set it with bundle=..., or leave objective.lora out")
    if c.job == "convert" and c.convert.to == "checkpoint" and not c.convert.folder:
        raise UserError("convert.to=checkpoint reads a universal checkpoint: set its folder with convert.folder=...")
    trains = c.job in ("pretrain", "finetune", "sweep")  # in other jobs the objective is the bundle's
    unlabeled = c.data.source == "files" and c.data.path and not c.data.label_column
    if trains and c.objective.name == "classification" and unlabeled:
        raise UserError("objective=classification needs labels: set their column with data.label_column=...")

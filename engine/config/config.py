"""The config of a job: its own options, all groups, and the values that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import Field, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Optional

from engine.config import option as options
from engine.config.data import DataConfig
from engine.config.evaluate import CardConfig, EvaluateConfig, PromoteConfig
from engine.config.jobs import ClusterConfig, ConvertConfig, DemoConfig, PlanConfig, TrackingConfig
from engine.config.model import ModelConfig, ObjectiveConfig
from engine.config.optim import OptimConfig, ScheduleConfig
from engine.config.option import Frozen, option, option_group
from engine.config.serve import ImproveConfig, KeyConfig, ServeConfig
from engine.config.sweep import SweepConfig
from engine.config.train import TrainConfig, ZeroConfig


@dataclass
class Config(Frozen):
    """The whole config of one job. Groups with identity=False say where, how long or under which name a job runs, not what it computes."""

    job: str = option("pretrain", "the job that this config is for", identity=False)
    name: str = option("run", "name of the run: its folder is <runs_dir>/<name>", identity=False)
    runs_dir: str = option("runs", "folder with all runs", identity=False)
    seed: int = option(0, "random seed of initialization, data order and sampling", least=0, identity=True, start_weights=True)  # fmt: skip
    resume: bool = option(False, "resume the run of that name although its config has changed", identity=False)
    profile: bool = option(
        False, "training: profile three steps after a warm-up; <runs_dir>/<name>/profile gets a trace and a summary", identity=False
    )  # fmt: skip
    bundle: Optional[str] = option(
        None,
        "the model to start from, to evaluate or to deploy: a run's name, a registered name or alias, or the folder of a bundle or of a Hugging Face model; "
        "deploy takes several: a+b", identity=True, micro_batch=True, parameter_count=True,
    )  # fmt: skip
    data: DataConfig = option_group(DataConfig, identity=True, start_weights=True)
    model: ModelConfig = option_group(ModelConfig, identity=True, micro_batch=True, parameter_count=True, start_weights=True)  # fmt: skip
    objective: ObjectiveConfig = option_group(ObjectiveConfig, identity=True, micro_batch=True, parameter_count=True)
    optim: OptimConfig = option_group(OptimConfig, identity=True)
    schedule: ScheduleConfig = option_group(ScheduleConfig, identity=True)
    zero: ZeroConfig = option_group(ZeroConfig, identity=False, micro_batch=True)
    train: TrainConfig = option_group(TrainConfig)
    sweep: SweepConfig = option_group(SweepConfig, identity=True)
    evaluate: EvaluateConfig = option_group(EvaluateConfig, identity=False)
    card: CardConfig = option_group(CardConfig, identity=False)
    promote: PromoteConfig = option_group(PromoteConfig, identity=False)
    plan: PlanConfig = option_group(PlanConfig, identity=False)
    convert: ConvertConfig = option_group(ConvertConfig, identity=False)
    serve: ServeConfig = option_group(ServeConfig, identity=False)
    improve: ImproveConfig = option_group(ImproveConfig, identity=False)
    key: KeyConfig = option_group(KeyConfig, identity=False)
    cluster: ClusterConfig = option_group(ClusterConfig, identity=False)
    tracking: TrackingConfig = option_group(TrackingConfig, identity=False)
    demo: DemoConfig = option_group(DemoConfig, identity=False)

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.runs_dir) / self.name

    @property
    def total_steps(self) -> int:
        """Steps of the learning-rate schedule."""
        return self.schedule.total_steps or self.train.max_steps

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        return round(self.schedule.warmup_fraction * self.total_steps)

    @property
    def global_batch(self) -> int:
        """Samples in a step, over all workers."""
        if self.train.global_batch_tokens is not None:
            return self.train.global_batch_tokens // self.data.sequence_length
        return self.train.global_batch or 32

    @property
    def samples_per_worker(self) -> int:
        """Maximum number of samples of a step that one worker processes, alone or with those that share its sequences."""
        return math.ceil(self.global_batch * self.train.sequence_parallel / self.train.workers)

    @property
    def micro_batch(self) -> int:
        """Samples in a forward pass of one worker: train.micro_batch, or up to 16, of the worker's samples of a step."""
        return min(self.train.micro_batch or 16, self.samples_per_worker)

    @property
    def tracking_uri(self) -> str:
        """URI of MLflow's store."""
        return self.tracking.uri or f"sqlite:///{Path(self.runs_dir).absolute()}/mlflow.db"

    @property
    def keys_file(self) -> Path:
        """File with the hashed API keys of endpoints."""
        return Path(self.serve.keys_file or Path(self.runs_dir) / "keys.json").absolute()

    @property
    def registry_dir(self) -> Path:
        """Folder of registered bundles: MLflow's artifacts if it has no server, else copies of the server's."""
        return Path(self.runs_dir).absolute() / "registry"


def declared(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield (dotted key, field, type) of every option, those of groups included."""
    return options.declared(kind, prefix)


@cache
def keys_with(flag: str) -> tuple[str, ...]:
    """Return the dotted keys of all options with a flag (identity, micro_batch, ...; see option.py), in the order of their declaration."""
    return tuple(key for key, value in options.flag_values(Config, flag).items() if value)

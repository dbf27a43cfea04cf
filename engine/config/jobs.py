"""The options of single jobs (plan, convert, demo), of the cluster and of experiment tracking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from engine.config.option import Frozen, option
from engine.errors import UserError


@dataclass
class PlanConfig(Frozen):
    """The assumptions of `manta plan`; no run depends on them."""

    device: str = option(
        "here", "device of a worker: here (its matmul throughput is measured), or one by its datasheet (engine/train/devices.py)",
        choices=("here", "v100_32gb", "a100_40gb", "a100_80gb", "h100_80gb", "h200_141gb"),
    )  # fmt: skip
    mfu: float = option(
        0.4, "model FLOPs utilization: fraction of the device's matmul throughput that a step reaches", above=0, most=1
    )
    tokens: Optional[float] = option(
        None, "training tokens in total, for the duration and the cost; None: those of max_steps", above=0
    )
    price: Optional[float] = option(None, "price of a device per hour, for the cost", least=0)
    write_rate: Optional[float] = option(
        None,
        "write throughput of a worker for checkpoints, in bytes per second; None: measured in runs_dir (device=here), else 1e9",
        above=0,
    )
    json: Optional[str] = option(None, "file to write all figures to, in bytes, seconds and FLOP/s")


@dataclass
class ConvertConfig(Frozen):
    """Conversion of a run's checkpoint to other formats, and back."""

    to: str = option(
        "bundle",
        "bundle: a Hugging Face folder; universal: DeepSpeed's universal checkpoint; "
        "checkpoint: a universal checkpoint becomes a checkpoint of the run `name`, which then resumes from it",
        choices=("bundle", "universal", "checkpoint"),
    )
    step: Optional[int] = option(None, "step of the run's checkpoint; None: the latest", least=1)
    folder: Optional[str] = option(
        None, "folder to write, or to read with to=checkpoint; None: <run>/bundle-STEP or <run>/universal"
    )

    def check(self) -> None:
        """Check that the step is for a direction that reads a run's checkpoints."""
        if self.to == "checkpoint" and self.step:
            raise UserError(
                "convert.step selects one of a run's checkpoints, and convert.to=checkpoint writes one: leave it out"
            )


@dataclass
class ClusterConfig(Frozen):
    """Where a job runs."""

    address: str = option(
        "local",
        "local: a Ray instance of the job's own; auto: the cluster of `manta cluster up`; or ray://host:port, host:port",
    )
    cpus: Optional[int] = option(None, "address=local: number of CPU cores to use; None: all", least=1)
    dashboard: bool = option(False, "address=local: start Ray's dashboard (on the loopback interface only)")


@dataclass
class TrackingConfig(Frozen):
    """Experiment tracking with MLflow."""

    uri: Optional[str] = option(None, "URI of the MLflow server; None: an SQLite file, <runs_dir>/mlflow.db")
    experiment: str = option("manta", "MLflow experiment")
    enabled: bool = option(True, "log runs to MLflow (metrics.jsonl is written in any case)")
    alias: str = option(
        "champion", "registry alias that `deploy` looks up by default, and that `promote` and `rollback` move"
    )


@dataclass
class DemoConfig(Frozen):
    """The whole life of a model in one job."""

    keep: bool = option(False, "keep the endpoint running at the end, until Ctrl-C")
    pretrain: list[str] = option([], "overrides for the demo's `manta pretrain`")
    sweep: list[str] = option([], "overrides for the demo's `manta sweep`")
    evaluate: list[str] = option([], "overrides for the demo's `manta evaluate`")

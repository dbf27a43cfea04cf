"""Logs runs to MLflow: the config as parameters, metrics by step. The driver logs, so that no training step waits for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from engine.config import Config, identity


class TrackedRun:
    """One MLflow run."""

    def __init__(self, config: Config, parent: str | None = None) -> None:
        """Create a run in tracking.experiment; `parent` is the MLflow run id of its parent run."""
        from mlflow import MlflowClient  # importing takes 1-3 s
        from mlflow.entities import Metric, Param

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._metric = Metric
        self.client = MlflowClient(config.tracking_uri)
        experiment = self.client.get_experiment_by_name(config.tracking.experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self.client.create_experiment(
                config.tracking.experiment,
                artifact_location=None if config.tracking.uri else f"file://{os.path.abspath(config.runs_dir)}/mlflow",
            )
        )
        tags = {"manta.job": config.job, "manta.folder": str(config.run_dir.absolute())}
        if parent:
            tags["mlflow.parentRunId"] = parent
        self.id: str = self.client.create_run(experiment_id, run_name=config.name, tags=tags).info.run_id
        values = [Param(key, str(value)[:500]) for key, value in identity(config).items()]
        for first in range(0, len(values), 100):  # MLflow's limit per batch
            self.client.log_batch(self.id, params=values[first : first + 100])

    def log(self, lines: Sequence[dict[str, Any]], timestamp_ms: int) -> None:
        """Log the numbers in lines of metrics.jsonl."""
        metrics = [
            self._metric(name, float(value), timestamp_ms, line["step"])
            for line in lines
            for name, value in line.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        for first in range(0, len(metrics), 1000):  # MLflow's limit per batch
            self.client.log_batch(self.id, metrics=metrics[first : first + 1000])

    def tag(self, key: str, value: str) -> None:
        """Set a tag on the run."""
        self.client.set_tag(self.id, key, value)

    def end(self, status: str) -> None:
        """End the run with status FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.id, status)

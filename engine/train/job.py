"""One training job, as it travels from the driver to the workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Config, from_dict, to_dict
from engine.data.manifest import Manifest
from engine.data.packing import Packing
from engine.data.processor import prepared_processor
from engine.objectives.contract import Objective, objective_class


@dataclass(frozen=True)
class Job:
    """One training job: a config with its model and objective, a data order, a start state."""

    config: Config
    data: Path  # folder of the prepared data
    start: Path | None = None  # folder of the bundle to start from; None: fresh weights
    leaves_bundle: bool = True  # a sweep's trial leaves its last checkpoint only

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the way to another process."""
        start = self.start and str(self.start)
        told = {"data": str(self.data), "start": start, "leaves_bundle": self.leaves_bundle}
        return {"config": to_dict(self.config), **told}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Job:
        """Read what `to_dict` wrote."""
        start = tree["start"] and Path(tree["start"])
        return cls(from_dict(tree["config"]), Path(tree["data"]), start, tree["leaves_bundle"])

    def objective(self) -> Objective:
        """Return the task, with the data's processor and labels."""
        labels = Manifest.load(self.data).labels
        processor, options = prepared_processor(self.data), self.config.objective
        data = self.config.data
        return objective_class(options.name)(options, processor, data.sequence_length, labels, Packing.of(data))

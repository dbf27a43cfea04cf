"""One training job, in the form in which the driver sends it to the workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Config, from_dict, to_dict
from engine.data.manifest import Manifest
from engine.data.packing import Packing
from engine.data.processor import load_prepared_processor
from engine.objectives.contract import Objective, objective_class


@dataclass(frozen=True)
class TrainJob:
    """One training job: a config, its prepared data, and the bundle that it starts from, if any."""

    config: Config
    data_folder: Path  # folder of the prepared data
    start_bundle: Path | None = None  # folder of the bundle to start from; None: random weights
    exports_bundle: bool = True  # False for a sweep's trial, which keeps its last checkpoint only

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, to be sent to another process."""
        start = self.start_bundle and str(self.start_bundle)
        return {
            "config": to_dict(self.config),
            "data_folder": str(self.data_folder),
            "start_bundle": start,
            "exports_bundle": self.exports_bundle,
        }

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> TrainJob:
        """Read what `to_dict` returned."""
        start = tree["start_bundle"] and Path(tree["start_bundle"])
        return cls(from_dict(tree["config"]), Path(tree["data_folder"]), start, tree["exports_bundle"])

    def objective(self) -> Objective:
        """Return the objective, with the data's processor and labels."""
        labels = Manifest.load(self.data_folder).labels
        processor, options = load_prepared_processor(self.data_folder), self.config.objective
        data = self.config.data
        return objective_class(options.name)(
            options, processor, data.sequence_length, labels, Packing.from_config(data)
        )

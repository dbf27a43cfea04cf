"""A training job as it is sent to the workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import Config
from engine.data.prepare import prepare
from engine.train.job import TrainJob


@pytest.mark.parametrize("start_bundle", [None, Path("/bundles/base")])
def test_a_job_is_read_back_from_plain_values(tiny: Config, start_bundle: Path | None) -> None:
    job = TrainJob(tiny, Path("/data"), start_bundle, exports_bundle=False)
    assert TrainJob.from_dict(json.loads(json.dumps(job.to_dict()))) == job


def test_the_objective_has_the_processor_of_the_data(tiny: Config) -> None:
    objective = TrainJob(tiny, prepare(tiny)).objective()
    assert type(objective).__name__ == "CausalLM"
    assert len(objective.processor) <= tiny.data.vocab_size

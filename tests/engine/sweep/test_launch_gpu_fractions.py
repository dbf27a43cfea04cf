"""Trials on fractions of a GPU, with logical GPUs of Ray: how many run concurrently, and on which device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import Config, to_dict, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.sweep import trial
from engine.sweep.launch import trial_share
from tests.engine.sweep.test_launch import ROOT, of

DRIVER = """
import functools, sys, yaml
from cluster.environment import set_default_environment
set_default_environment()
import ray
ray.init = functools.partial(ray.init, num_gpus=1)
from engine.config import from_dict
from engine.sweep import launch
from jobs.sweep import sweep
from tests.engine.sweep.test_launch_gpu_fractions import run_trial
launch.run_trial = run_trial
sweep(from_dict(yaml.safe_load(open(sys.argv[1]))))
"""


def run_trial(config: dict[str, Any], spec: dict[str, Any], **options: Any) -> None:
    """Run a trial, and write the resources that Ray assigned to it and when it ran."""
    import ray

    started = time.time()
    devices, process = os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()
    record = {"gpus": ray.get_gpu_ids(), "devices": devices, "process": process, "resources": options["resources"]}
    try:
        trial.run_trial(config, spec, **options)
    finally:
        file = Path(spec["config"]["runs_dir"]) / f"{config['name']}.json"
        file.write_text(json.dumps(record | {"started": started, "ended": time.time()}))


def test_trials_share_gpus_and_cores(tiny: Config) -> None:
    def share(gpus: float | None, cluster: dict[str, float], **values: Any) -> tuple[int, dict[str, float]]:
        options = {f"{key.replace('__', '.')}": value for key, value in values.items()}
        return trial_share(with_values(tiny, {"train.gpus_per_worker": gpus, **options}), cluster)

    assert share(0.5, {"CPU": 4.0, "GPU": 1.0}) == (2, {"CPU": 2.0, "GPU": 0.5})
    assert share(None, {"CPU": 4.0, "GPU": 1.0}) == (1, {"CPU": 4.0, "GPU": 1.0})
    assert share(0.25, {"CPU": 16.0, "GPU": 4.0}, sweep__trials=40) == (16, {"CPU": 1.0, "GPU": 0.25})
    assert share(0.25, {"CPU": 16.0, "GPU": 4.0}) == (8, {"CPU": 2.0, "GPU": 0.25})  # limited by the number of trials
    assert share(0.25, {"CPU": 16.0, "GPU": 4.0}, sweep__max_concurrent_trials=2) == (2, {"CPU": 8.0, "GPU": 0.25})
    assert share(0.1, {"CPU": 2.0, "GPU": 1.0}) == (4, {"CPU": 0.5, "GPU": 0.1})  # half a core each
    assert share(1.0, {"CPU": 16.0, "GPU": 4.0}, train__workers=2) == (2, {"CPU": 4.0, "GPU": 1.0})
    assert share(0.5, {"CPU": 4.0, "GPU": 1.0}, train__cpus_per_worker=3.0) == (1, {"CPU": 3.0, "GPU": 0.5})
    with pytest.raises(UserError, match="the cluster has 0 GPUs"):
        share(0.5, {"CPU": 4.0})


def test_trials_with_several_workers_need_whole_gpus(tiny: Config) -> None:
    with pytest.raises(UserError, match=r"several of train\.workers 2 on one GPU"):
        with_values(tiny, {"train.workers": 2, "train.gpus_per_worker": 0.5})


@pytest.mark.slow
def test_two_trials_with_half_a_gpu_each_run_concurrently_on_the_same_gpu(tiny_functions: Config) -> None:
    config = of(
        tiny_functions, "halves", sweep__trials=4, sweep__max_concurrent_trials=None, sweep__scheduler="none", train__max_steps=60,
        train__gpus_per_worker=0.5, cluster__cpus=2,
    )  # fmt: skip
    prepare(config)
    file = Path(config.runs_dir) / "halves.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(file)], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in sorted((config.run_dir / "trials").glob("*.json"))]
    assert len(records) == 4
    assert all(record["gpus"] == [0] and record["devices"] == "0" for record in records)
    assert all(record["resources"] == {"CPU": 1.0, "GPU": 0.5} for record in records)
    first, second = records[:2]
    assert first["process"] != second["process"]
    assert first["started"] < second["ended"]
    assert second["started"] < first["ended"]
    assert len({record["process"] for record in records}) == 2  # the later trials reuse the two processes

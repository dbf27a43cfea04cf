"""Sweeps on Ray Tune: trials, the bundle of the best one, what is kept of the others, and resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ray import cloudpickle

from engine.bundles.bundle import Bundle
from engine.config import Config, to_dict, with_values
from engine.evaluate.sweep_page import write_sweep_page
from engine.sweep import launch
from engine.sweep.launch import SweepResult, base_job, make_search_algorithm, run_trials, sweep, trial_share
from engine.sweep.population import PopulationBasedTraining
from engine.sweep.recovery import Recovery
from engine.sweep.search_space import parse_search_space
from engine.sweep.trial import trial_job
from engine.sweep.trial_record import TrialTask, read_trial
from engine.train.checkpoint import Checkpoint, step_folder
from engine.train.run_folder import RunFolder
from engine.train.worker import single_process_group, train_worker

SPACE = {"optim.lr": {"loguniform": [1e-3, 1e-2]}, "train.global_batch": {"choice": [8, 16]}}
ROOT = Path(__file__).parents[3]


def of(config: Config, name: str, **values: Any) -> Config:
    """Configure a sweep of four trials of six steps."""
    options = {"name": name, "job": "sweep", "sweep.space": SPACE, "sweep.trials": 4, "sweep.max_concurrent_trials": 2,
             "sweep.grace_steps": 2, "train.max_steps": 6, "sweep.metric": "loss", "sweep.mode": "min"}  # fmt: skip
    return with_values(config, options | {key.replace("__", "."): value for key, value in values.items()})


def check_result(config: Config, result: SweepResult) -> None:
    """Check what is true of every sweep."""
    finished = [trial for trial in result.trials if trial.state == "finished"]
    assert result.best.value == min(trial.value for trial in finished if trial.value is not None)
    for trial in result.trials:
        if trial.curve:
            lines = {line["step"]: line for line in RunFolder(config.run_dir / "trials" / trial.name).metrics()}
            assert trial.value == lines[trial.steps]["validation_loss"]
    bundle = Bundle.open(config.run_dir / "bundle")
    bundle.verify()
    bundle.replay(bundle.model())
    assert bundle.manifest is not None
    assert bundle.manifest.run is not None
    assert bundle.manifest.run["name"] == result.bundle["name"]
    assert bundle.manifest.evaluation["validation_loss"] == result.bundle["value"]
    assert json.loads((config.run_dir / "sweep.json").read_text())["best"]["name"] == result.best.name
    assert [folder.parent.name for folder in (config.run_dir / "trials").glob("*/checkpoints")] == [result.best.name]
    page = write_sweep_page(config.run_dir, config.name, json.loads(json.dumps(asdict(result)))).read_text()
    assert result.best.name in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_cores_are_shared_among_trials(tiny: Config) -> None:
    assert trial_share(tiny, {"CPU": 4.0}) == (4, {"CPU": 1.0})
    assert trial_share(with_values(tiny, {"sweep.max_concurrent_trials": 2}), {"CPU": 4.0}) == (2, {"CPU": 2.0})
    assert trial_share(with_values(tiny, {"train.workers": 2}), {"CPU": 4.0}) == (2, {"CPU": 1.0})
    assert trial_share(with_values(tiny, {"train.cpus_per_worker": 2.0}), {"CPU": 4.0}) == (2, {"CPU": 2.0})


def test_tune_does_not_pickle_the_terminal_or_the_algorithm(tmp_path: Path) -> None:
    lock = threading.Lock()  # which cannot be pickled, like that of a live table
    for adapter in launch.tune_adapters(lock, Recovery(0), RunFolder(tmp_path), 1, lambda: None):  # type: ignore[arg-type]
        cloudpickle.dumps(adapter)


def test_a_sweep_stops_bad_trials_and_keeps_the_best(ray: None, tiny_functions: Config) -> None:
    config = of(tiny_functions, "sweep", tracking__enabled=True)
    result = sweep(config)
    assert len(result.trials) == 4
    assert {trial.state for trial in result.trials} <= {"finished", "stopped early"}
    assert len({trial.process for trial in result.trials}) <= 2  # two processes, reused from task to task
    check_result(config, result)
    assert result.bundle["name"] == result.best.name
    assert sweep(config) == result  # nothing is repeated

    from mlflow import MlflowClient

    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name("manta")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"sweep", *(trial.name for trial in result.trials)}
    best = runs[result.best.name]
    assert best.data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    assert best.data.metrics["validation_loss"] == result.best.value
    assert float(best.data.params["optim.lr"]) == result.best.params["optim.lr"]


def test_a_failed_or_refused_trial_does_not_affect_the_others(ray: None, tiny_functions: Config) -> None:
    config = of(
        tiny_functions, "part", sweep__scheduler="none", sweep__searcher="grid", optim__clip=0.0, sweep__max_concurrent_trials=1,
        sweep__space={"optim.lr": {"choice": [1e30, 1e-3]}, "train.micro_batch": {"choice": [4, 16]},
                      "train.global_batch": {"choice": [8]}},
        sweep__metric=None, sweep__mode=None,
    )  # fmt: skip
    # Each value is valid by itself with the base config.
    config = with_values(config, {"train.global_batch": 16})
    result = sweep(config)
    states = {(t.params["optim.lr"], t.params["train.micro_batch"]): t for t in result.trials}
    assert states[1e-3, 4].state == "finished"
    assert states[1e30, 4].state == "failed"
    assert "use a lower optim.lr" in states[1e30, 4].reason
    assert [states[lr, 16].state for lr in (1e-3, 1e30)] == ["refused", "refused"]
    assert "train.micro_batch 16 is more than" in states[1e-3, 16].reason
    assert not (config.run_dir / "trials" / states[1e-3, 16].name / "metrics.jsonl").exists()
    assert states[1e-3, 4].process != 0  # the process survived the failure before
    assert result.best is states[1e-3, 4]


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_does_not_affect_the_others(
    ray: None, tiny_functions: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        launch.MemoryCheck, "fit_micro_batch", lambda self, config: (config, "")
    )  # which would refuse it
    config = of(tiny_functions, "large", sweep__scheduler="none", sweep__searcher="grid", sweep__max_concurrent_trials=1,
                sweep__space={"model.intermediate_size": {"choice": [10**13, 64]}})  # fmt: skip
    result = sweep(config)
    assert [trial.state for trial in result.trials] == ["failed", "finished"]
    assert "can't allocate memory" in result.trials[0].reason
    assert result.trials[0].losses == 0  # a restart would not help


def lineage(pbt: PopulationBasedTraining, member: int) -> list[dict[str, Any]]:
    """Return the params that a member's weights were trained with, round by round."""
    params: list[dict[str, Any]] = []
    rounds = [result.params for result in pbt.state.rounds] + [pbt.state.params]
    for at in reversed(range(len(rounds))):
        params.insert(0, rounds[at][member])
        step = at * pbt.state.interval
        member = next((e.donor for e in pbt.state.exploits if e.step == step and e.member == member), member)
    return params


def test_a_member_that_exploits_resumes_from_the_donors_checkpoint(ray: None, tiny_functions: Config) -> None:
    config = of(tiny_functions, "pbt", sweep__scheduler="pbt", sweep__perturbation_interval=2, train__micro_batch=4,
                sweep__max_concurrent_trials=None, train__cpus_per_worker=1.0)  # fmt: skip
    run, space = RunFolder.create_or_resume(config), parse_search_space(config)
    base = base_job(config, run)
    base = type(base)(
        with_values(base.config, {"train.keep_checkpoints": 9}), base.data_folder, base.start_bundle, False
    )  # for inspection below
    pbt, _ = make_search_algorithm(config, base, space, ["loss"], ["min"])
    assert isinstance(pbt, PopulationBasedTraining)
    run_trials(config, base, run, pbt, ["loss"], lambda: None)
    exploits = pbt.state.exploits
    assert len(exploits) == 2
    assert [e.step for e in exploits] == [2, 4]
    assert all(trial.state == "finished" and trial.steps == 6 for trial in pbt.trials.values())
    later = {
        e.step: {other.member for other in exploits if other.step > e.step} for e in exploits
    }  # members whose folders have changed since
    unchanged = [e for e in exploits if not later[e.step] & {e.member, e.donor}]
    assert exploits[-1] in unchanged
    for exploit in unchanged:  # bit for bit, including moments and data position
        donor, member_checkpoint = (
            Checkpoint(step_folder(RunFolder(config.run_dir / "trials" / pbt.trials[i].name).checkpoints, exploit.step))
            for i in (exploit.donor, exploit.member)
        )
        assert donor.state == member_checkpoint.state
        for name in donor.shapes:
            actual, expected = member_checkpoint.tensors(name), donor.tensors(name)
            assert list(actual) == list(expected)
            assert all(torch.equal(actual[kind], expected[kind]) for kind in actual)
        at = exploit.step // 2
        assert (
            exploit.params == pbt.state.params[exploit.member]
            if at == 2
            else pbt.state.rounds[at].params[exploit.member]
        )

    # The result of the last exploit equals training in one process with the params of its lineage, round by round.
    member, threads = exploits[-1].member, torch.get_num_threads()
    torch.set_num_threads(1)
    (config.run_dir / "trials" / "again" / "logs").mkdir(parents=True)
    staged = type(base)(
        with_values(base.config, {"schedule.total_steps": 6}), base.data_folder, base.start_bundle, False
    )
    for at, params in enumerate(lineage(pbt, member)):
        task = TrialTask(0, "again", params, 2 * at, 2 * at + 2, str(base.data_folder))
        train_worker(trial_job(task, staged), single_process_group())
    torch.set_num_threads(threads)
    again, trained = (
        Checkpoint(step_folder(RunFolder(config.run_dir / "trials" / name).checkpoints, 6))
        for name in ("again", pbt.trials[member].name)
    )
    for name in again.shapes:
        assert all(torch.equal(again.tensors(name)[kind], trained.tensors(name)[kind]) for kind in again.tensors(name))


@pytest.mark.slow
def test_a_finished_sweep_can_be_extended_by_more_trials(ray: None, tiny_functions: Config) -> None:
    config = of(tiny_functions, "more", sweep__trials=2)
    result = sweep(config)
    more = with_values(
        config, {"sweep.trials": 4, "resume": True, "sweep.searcher": "tpe", "sweep.scheduler": "hyperband"}
    )
    longer = sweep(more)
    assert longer.trials[:2] == result.trials
    assert len(longer.trials) == 4
    check_result(more, longer)


@pytest.mark.slow
def test_a_soup_is_kept_only_if_it_is_better(ray: None, tiny_functions: Config) -> None:
    config = of(
        tiny_functions, "soup", sweep__soup=3, sweep__scheduler="none", sweep__trials=3, train__precision="fp32"
    )
    result = sweep(config)
    assert len(result.trials) == 3
    best_value, bundle = result.best.value, result.bundle
    assert best_value is not None
    assert bundle["value"] < best_value if bundle["name"] == "soup-soup" else bundle["value"] == best_value
    check_result(config, result)


@pytest.fixture
def killed(tiny_functions: Config) -> tuple[Config, int]:
    """Start `manta sweep` in a separate process, and kill it with all its children once two trials are over or paused."""
    from engine.data.prepare import prepare

    prepare(tiny_functions)
    config = of(tiny_functions, "killed-sweep", train__max_steps=8, sweep__scheduler="asha", cluster__cpus=2)
    file = Path(config.runs_dir) / "killed.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    code = (
        "import sys, yaml; from cluster.environment import set_default_environment; set_default_environment();"
        "from engine.config import from_dict; from jobs.sweep import sweep;"
        "sweep(from_dict(yaml.safe_load(open(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, str(file)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    driver = subprocess.Popen(command, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    trials, deadline = config.run_dir / "trials", time.monotonic() + 240
    while len(list(trials.glob("*/trial.json"))) < 2:
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs([child for child in children if "RuntimeEnv" not in child.name()], timeout=60)
    assert not [process for process in alive if "run_trial" in process.name() or "ImplicitFunc" in process.name()]
    for process in alive:  # Ray's agents notice the lost raylet only after a while
        process.kill()
    return config, len(list(trials.glob("*/trial.json")))


def test_a_killed_sweep_repeats_nothing(killed: tuple[Config, int], ray: None) -> None:
    config, num_recorded = killed
    assert num_recorded >= 2
    assert not (config.run_dir / "sweep.json").exists()
    before = {}
    for file in (config.run_dir / "trials").glob("*/trial.json"):  # over or paused
        trial = read_trial(file.parent)
        assert trial is not None
        before[trial.index] = (file.parent / "metrics.jsonl").read_bytes().splitlines()[: trial.steps]
        assert len(before[trial.index]) == trial.steps
    result = sweep(config)
    assert len(result.trials) == 4
    for index, lines in before.items():  # including the times at which they were written
        file = config.run_dir / "trials" / result.trials[index].name / "metrics.jsonl"
        assert file.read_bytes().splitlines()[: len(lines)] == lines
    space = parse_search_space(config)
    assert [trial.params for trial in result.trials] == launch.make_searcher(
        space, config, ["loss"], ["min"], []
    )._params
    for trial in result.trials:
        assert read_trial(config.run_dir / "trials" / trial.name) == trial
    check_result(config, result)


@pytest.mark.slow
def test_ranks_of_a_trial_are_reused_and_stop_together(ray: None, tiny_functions: Config) -> None:
    config = of(
        tiny_functions, "wide", sweep__searcher="grid", train__workers=2, zero__stage=2, sweep__max_concurrent_trials=1,
        sweep__space={"optim.lr": {"choice": [3e-3, 1e-6]}, "data.vocab_size": {"choice": [512, 400]}},
    )  # fmt: skip
    result = sweep(config)
    assert result.trials[0].state == "finished"
    assert [trial.state for trial in result.trials[2:]] == ["stopped early"] * 2
    assert len({trial.process for trial in result.trials}) == 1
    check_result(config, result)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"sweep__searcher": "bohb", "sweep__scheduler": "hyperband"}, {"sweep__scheduler": "median"},
                                  {"sweep__scheduler": "pb2", "sweep__perturbation_interval": 2}])  # fmt: skip
def test_other_searchers_and_schedulers(ray: None, tiny_functions: Config, more: dict[str, Any]) -> None:
    name = "-".join(str(value) for value in more.values())
    config = of(tiny_functions, f"by-{name}", sweep__trials=6, **more)
    result = sweep(config)
    assert len(result.trials) == 6
    check_result(config, result)
    assert bool(result.exploits) == ("pb2" in name)


@pytest.mark.slow
def test_several_metrics_have_a_pareto_front(ray: None, tiny_functions: Config) -> None:
    config = of(tiny_functions, "two", sweep__searcher="tpe", sweep__metric="loss+accuracy", sweep__mode="min+max")
    result = sweep(config)
    assert result.best.name in result.front
    assert all(set(trial.others) == {"accuracy"} for trial in result.trials)
    check_result(config, result)


@pytest.mark.slow
def test_the_best_is_retrained_at_full_length(ray: None, tiny_functions: Config) -> None:
    config = of(tiny_functions, "long", sweep__retrain_steps=12, sweep__trials=2)
    result = sweep(config)
    assert result.bundle["name"] == "long-retrained"
    assert result.bundle["step"] == 12
    check_result(config, result)

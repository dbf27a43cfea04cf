"""The command line as a user sees it: mistakes, help, multirun, former option names."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.config import Config, declared
from engine.errors import UserError
from jobs.entry import add_keys, compose, run_job, sets_data
from tests.engine.train.test_checkpoint import flip, write


def manta(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.manta", *words], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "train.max_step=3"], "train.max_step is not an option; did you mean 'train.max_steps'?"),
        (["pretrain", "trian.max_steps=3"], "trian.max_steps is not an option; did you mean 'train.max_steps'?"),
        (["pretrain", "train.max_steps=many"], "train.max_steps=many is not an integer"),
        (["pretrain", "model=llama_5mm"], "did you mean 'llama_5m'?"),
        (["pretrain", "train.micro_batch=16", "train.global_batch=8"], "use train.micro_batch=8 or less"),
        (["pretrain", "data.sequence_length=4096"], "is over the model's 512 positions: use data.sequence_length=512"),
        (["pretrain", "--fast"], "--fast is not a flag"),
        (["pretrian"], "did you mean 'pretrain'?"),
        (["prepare", "data=files", "data.path=nowhere/*.jsonl"], "nowhere"),
        (["prepare", "data=files"], "data.path"),
        (["evaluate", "bundle=nothing"], "bundle=nothing is neither a folder, nor a run, nor a registered name"),
        (["evaluate"], "bundle=NAME_OR_FOLDER"),
        (["evaluate", "x", "suite=lm_eval"], "go together"),
        (["compare", "one"], "compare needs two bundles: manta compare A B"),
        (["compare", "one", "two"], "bundle=one is neither a folder"),
        (["promote"], "manta promote NAME"),
        (["rollback"], "manta rollback NAME"),
        (["lineage", "nothing"], "bundle=nothing is neither a folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = manta(*words, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15  # CPU seconds: Ray isn't started


def test_a_former_option_name_is_understood_with_a_warning(tmp_path: Path) -> None:
    done = manta("deploy", "--cfg", "job", "serve.max_batch=3", cwd=tmp_path)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["serve"]["max_num_seqs"] == 3
    assert "serve.max_batch is now called serve.max_num_seqs" in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = manta("pretrain", "train.max_step=3", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_second_run_of_a_name_with_another_config_is_refused(tmp_path: Path) -> None:
    from engine.train.run_folder import RunFolder

    first = compose("pretrain", [f"runs_dir={tmp_path}", "name=mine"])
    RunFolder.create_or_resume(first)
    RunFolder.create_or_resume(
        compose("pretrain", [f"runs_dir={tmp_path}", "name=mine", "train.workers=2", "zero.stage=3"])
    )
    other = compose("pretrain", [f"runs_dir={tmp_path}", "name=mine", "optim.lr=0.5"])
    with pytest.raises(UserError, match=r"exists with another config \(optim.lr: 0.001 -> 0.5\).*resume=true"):
        RunFolder.create_or_resume(other)
    RunFolder.create_or_resume(
        compose("pretrain", [f"runs_dir={tmp_path}", "name=mine", "optim.lr=0.5", "resume=true"])
    )
    assert yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text())["optim"]["lr"] == 0.5


def test_help_lists_every_option_and_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = manta("pretrain", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for key, _, _ in declared():
        assert f"{key}=" in done.stdout, key
    assert "llama_5m" in done.stdout
    assert run_job("pretrain", print, ["--help"]) == 0


def test_cfg_job_prints_the_config(tmp_path: Path) -> None:
    done = manta("pretrain", "--cfg", "job", "train.max_steps=7", cwd=tmp_path)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["train"]["max_steps"] == 7


def test_positional_words_become_values_of_their_keys() -> None:
    overrides = add_keys(["a", "train.max_steps=3", "b", "c"], ("bundle", "evaluate.against"))
    assert overrides == ["bundle=a", "train.max_steps=3", "evaluate.against=b", "c"]
    assert not sets_data(["bundle=data", "evaluate.split=test"])
    assert sets_data(["bundle=a", "data.path=x"])
    assert sets_data(["data=files"])


def test_a_jobs_exit_code_is_that_of_its_function() -> None:
    assert run_job("lineage", lambda config: 3, []) == 3
    assert run_job("lineage", lambda config: None, []) == 0


def test_a_mapping_is_replaced_and_not_merged() -> None:
    space = compose("sweep", ["sweep.space={optim.lr:{uniform:[1e-3,2e-3]}}"]).sweep.space
    assert space == {"optim.lr": {"uniform": [1e-3, 2e-3]}}
    assert set(compose("sweep", []).sweep.space) == {
        "optim.lr",
        "optim.weight_decay",
        "train.global_batch",
        "objective.frozen_layers",
    }
    with pytest.raises(UserError, match=r"sweep\.space takes a mapping"):
        compose("sweep", ["sweep.space=3"])


def test_braces_in_a_text_are_not_a_mapping() -> None:
    words = ["experiment=clip", "data.path=x.parquet"]
    for override in ("data.caption=a {label}, it says", 'data.caption="a {label}, it says"'):
        assert compose("pretrain", [*words, override]).data.caption == "a {label}, it says"
    assert compose("pretrain", words).data.caption == "a photo of a {label}"


def test_multirun_gives_each_run_a_name(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"paragraph {i} of a text that is long enough" for i in range(400)))
    done = manta("prepare", "-m", "data=files", "data.path=text.txt", "data.vocab_size=300,320", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "data").glob("files-*"))) == 2


def test_every_command_has_help(tmp_path: Path) -> None:
    from jobs.manta import COMMANDS

    assert set(COMMANDS) == {
        "prepare",
        "pretrain",
        "finetune",
        "sweep",
        "evaluate",
        "compare",
        "promote",
        "rollback",
        "key",
        "lineage",
        "improve",
        "deploy",
        "convert",
        "plan",
        "demo",
        "runs",
        "cluster",
        "submit",
        "jobs",
        "doctor",
    }
    for command in ("runs", "cluster", "submit", "jobs", "doctor"):
        done = manta(command, "--help", cwd=tmp_path)
        assert done.returncode == 0, command
        assert "usage" in done.stdout


def test_runs_are_listed(tmp_path: Path) -> None:
    from engine.train.run_folder import RunFolder, RunStatus, now

    run = RunFolder(tmp_path / "runs" / "mine")
    run.path.mkdir(parents=True)
    run.write_status(RunStatus("pretrain", "finished", 3, 3, 1.25, now() - 120, 1, data="runs/data/x-1"))
    done = manta("runs", cwd=tmp_path)
    assert all(word in done.stdout for word in ("mine", "finished", "3/3", "1.2500", "2 min", "x-1"))


def test_one_run_is_shown(tmp_path: Path, tiny: Config) -> None:
    from engine.config import to_dict, with_values
    from engine.train.run_folder import RunFolder, RunStatus, now

    run = RunFolder(tmp_path / "runs" / "mine")
    run.path.mkdir(parents=True)
    run.write_status(
        RunStatus("pretrain", "failed", 3, 9, 1.25, now() - 120, 1, "runs/base/bundle", "runs/data/x-1", "no disk")
    )
    run.config_file.write_text(yaml.safe_dump(to_dict(with_values(tiny, {"optim.lr": 0.25, "name": "mine"}))))
    run.metrics_file.write_text("".join(json.dumps({"step": i, "loss": 9.0 - i}) + "\n" for i in range(1, 4)))
    flip(next(write(run.checkpoints, 3).glob("*.safetensors")))
    write(run.checkpoints, 2)
    output = manta("runs", "mine", "--verify", cwd=tmp_path).stdout
    for text in (
        "pretrain, failed, step 3 of 9, 2 min ago", "no disk", "optim.lr=0.25", "█▅▁ 8.0000 -> 6.0000, minimum 6.0000",
        "data runs/data/x-1", "bundle runs/base/bundle", "step-00000002 (", ", intact)", "broken: ", "was changed",
    ):  # fmt: skip
        assert text in output, f"{text} in {output}"
    assert "optim.beta1" not in output
    assert "did you mean 'mine'?" in manta("runs", "mime", cwd=tmp_path).stderr

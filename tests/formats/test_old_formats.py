"""Files that the previous version wrote load with today's code, and give the same numbers.

`files/` was written by commit 228feef, the last one with the option names data.licence, serve.max_batch etc., from
`texts/*.txt` (60,000 characters of Shakespeare); only absolute paths were made relative, and the hashes over them renewed:

    manta pretrain model=llama_tiny model.hidden_size=32 ... data=files data.path='texts/*.txt' data.licence=CC0-1.0 name=base
    manta evaluate bundle=base evaluate.split=validation name=evaluate
    manta sweep ... sweep.trials=2 name=search
    manta key new name=clerk key.requests_per_minute=10
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from engine.bundles.bundle import Bundle
from engine.config import former_names, from_dict, read_tree
from engine.data.manifest import Manifest
from engine.data.shards import Split
from engine.improve.examples import read_requests_and_feedback
from engine.serve.http.api_keys import read_keys
from engine.serve.http.feedback_store import read_records
from engine.sweep.launch import read_result
from engine.sweep.trial_record import read_trial
from engine.train.checkpoint import Checkpoint, step_folders
from engine.train.run_folder import RunFolder

FILES = Path(__file__).parent / "files"
RUN = FILES / "base"


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(former_names, "_warned", set())


def prepared_data() -> Path:
    return next((FILES / "data").iterdir())


def test_prepared_data() -> None:
    manifest = Manifest.load(prepared_data())
    assert manifest.license == "CC0-1.0"
    assert manifest.hash == json.loads((RUN / "bundle" / "manta.json").read_text())["data"]["hash"]
    assert manifest.content_hash() == manifest.hash
    assert {name: split["tokens"] for name, split in manifest.splits.items()} == {
        "train": 23624,
        "validation": 14005,
        "test": 5625,
    }
    split = Split.open(prepared_data(), "train")
    assert split.num_tokens == 23624


def test_a_runs_config_has_the_current_names(capsys: pytest.CaptureFixture[str]) -> None:
    old = yaml.safe_load((RUN / "config.yaml").read_text())
    assert (old["serve"]["max_batch"], old["data"]["licence"], old["improve"]["go"]) == (4, "CC0-1.0", True)
    config = from_dict(read_tree(RUN / "config.yaml"))
    assert (config.serve.max_num_seqs, config.data.license, config.improve.apply) == (4, "CC0-1.0", True)
    assert config.card.license == "MIT"
    assert "serve.max_batch is now serve.max_num_seqs" in capsys.readouterr().err


def test_a_run_may_be_resumed_by_the_same_command(tmp_path: Path) -> None:
    """Its config is the same one under the current names, and so is the hash in its checkpoint."""
    from engine.config import fingerprint, with_values

    shutil.copytree(RUN, tmp_path / "base")
    config = with_values(from_dict(read_tree(RUN / "config.yaml")), {"runs_dir": str(tmp_path), "train.max_steps": 8})
    assert RunFolder.create_or_resume(config).path == tmp_path / "base"
    (folder,) = step_folders(RUN / "checkpoints")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["about"]["config"] == fingerprint(config)


def test_a_runs_status_and_metrics() -> None:
    run = RunFolder(RUN)
    status = run.status()
    assert status is not None
    assert (status.state, status.step, status.job) == ("finished", 4, "pretrain")
    assert [line["loss"] for line in run.metrics()] == pytest.approx([5.70435, 5.69388, 5.68469, 5.68198], abs=1e-5)


def test_a_checkpoint() -> None:
    (folder,) = step_folders(RUN / "checkpoints")
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    state = checkpoint.state
    assert (state.step, state.tokens, state.skipped_data_steps, state.evals_since_best) == (4, 1024, 0, 0)
    assert state.best == pytest.approx(5.669546579942107)
    weights = checkpoint.weights()
    assert weights["model.embed_tokens.weight"].shape == (300, 32)
    bundle = dict(Bundle.open(RUN / "bundle").model(torch.float32).named_parameters())
    assert torch.equal(weights["model.embed_tokens.weight"], bundle["model.embed_tokens.weight"])


def test_a_bundle() -> None:
    bundle = Bundle.open(RUN / "bundle")
    bundle.verify()
    assert bundle.manifest is not None
    assert bundle.manifest.license == "MIT"
    bundle.replay(bundle.model(torch.float32))


def test_a_sweep_and_its_trials() -> None:
    result = read_result(FILES / "search" / "sweep.json")
    trials = [read_trial(folder) for folder in sorted((FILES / "search" / "trials").iterdir())]
    assert [trial.name for trial in result.trials] == [trial.name for trial in trials if trial]
    assert [trial.state for trial in result.trials] == ["finished", "stopped early"]
    assert [trial.value for trial in result.trials] == pytest.approx([5.151271851733327, 5.42786424793303])
    assert result.best.name == "search-000"
    assert result.best.params == {"optim.lr": pytest.approx(0.009860616829983267)}


def test_an_evaluation() -> None:
    (record,) = json.loads((FILES / "evaluate" / "evaluation.json").read_text())["bundles"]
    assert record["hash"] == Bundle.open(RUN / "bundle").hash
    assert record["metrics"]["loss"]["value"] == pytest.approx(5.669343542452535)


def test_api_keys() -> None:
    (key,) = read_keys(FILES / "keys.json")
    assert (key.name, key.requests_per_minute, key.tokens_per_minute) == ("clerk", 10, None)


def test_feedback_and_recorded_requests() -> None:
    folder = FILES / "feedback"
    assert [row["rating"] for row in read_records(folder, "feedback").to_pylist()] == [1, -1]
    requests, feedback = read_requests_and_feedback([folder], "d195b86b18c1f086")
    assert [(request.text, request.output) for request in requests] == [("To be", ", or not")]
    assert [(row.request_id, row.is_bad, row.text) for row in feedback] == [
        ("cmpl-1", False, "To be, or not to be"),
        ("cmpl-2", True, None),
    ]


def test_manta_runs_shows_an_old_run() -> None:
    words = [sys.executable, "-m", "jobs.manta", "runs", "base", "--verify", "--runs-dir", str(FILES)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for word in ("step 4 of 4", "serve.max_num_seqs=4", "card.license=MIT", ", intact"):
        assert word in done.stdout
    assert "data.licence is now data.license" in done.stderr

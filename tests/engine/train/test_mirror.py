"""The mirror of a run in remote storage: its content, and that a restored run continues bit for bit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.errors import UserError
from engine.train.job import TrainJob
from engine.train.mirror import Mirror, restore_from_mirror
from engine.train.run_folder import RunFolder, RunStatus
from tests.engine.train.ranks import losses, run_here
from tests.stores import Bucket


def train_with_mirror(config: Config, warnings: list[str] | None = None) -> list[dict[str, Any]]:
    """Run a job on one rank with its mirror, as `launch.train` does."""
    run = RunFolder.create_or_resume(config)
    with Mirror(run, config, (warnings if warnings is not None else []).append):
        [lines] = run_here([TrainJob(config, prepare(config))])
        run.write_status(RunStatus("pretrain", "finished", step=lines[-1]["step"], max_steps=config.train.max_steps))
    return lines


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_continues_from_its_mirror(
    tiny: Config, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.train.mirror.POLL_S", 0.05)
    options = {"runs_dir": str(tmp_path / "one"), "train.checkpoint_every": 2, "schedule.total_steps": 8}
    config = with_values(tiny, options | {"name": "copied", "train.mirror": f"{s3.address}/runs"})
    [uninterrupted] = run_here(
        [TrainJob(with_values(config, {"name": "uninterrupted", "train.max_steps": 8}), prepare(config))]
    )
    assert not restore_from_mirror(config)
    warnings: list[str] = []
    train_with_mirror(config, warnings)
    assert not warnings
    local = {name: c for name, c in content(config.run_dir).items() if not name.startswith(("logs/", "profile/"))}
    mirrored = {path.split("/copied/")[1] for path in s3.filesystem.find("corpora/runs/copied")}
    assert mirrored == set(local)
    assert {name.split("/")[1] for name in mirrored if name.startswith("checkpoints/")} == {
        "step-00000004",
        "step-00000006",
    }

    shutil.rmtree(config.run_dir)
    elsewhere = with_values(config, {"runs_dir": str(tmp_path / "two")})
    assert restore_from_mirror(elsewhere)
    assert content(elsewhere.run_dir) == local
    assert not restore_from_mirror(elsewhere)
    with pytest.raises(UserError, match="exists with another config"):
        RunFolder.create_or_resume(with_values(elsewhere, {"optim.lr": 0.5}))
    longer = train_with_mirror(with_values(elsewhere, {"train.max_steps": 8}))
    assert losses(longer) == losses(uninterrupted)
    assert [line["step"] for line in longer] == list(range(1, 9))
    mirrored = {path.split("/")[4] for path in s3.filesystem.find("corpora/runs/copied/checkpoints")}
    assert mirrored == {"step-00000006", "step-00000008"}


def test_a_storage_error_is_reported_once_and_the_run_continues(
    tiny: Config, s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.train.mirror.POLL_S", 0.01)
    config = with_values(tiny, {"runs_dir": str(tmp_path), "train.mirror": f"{s3.address}/runs", "name": "torn"})
    put, failed, repaired = s3.filesystem.put_file, [], []

    def failing_put(source: str, target: str) -> None:
        if target.endswith("checkpoints/step-00000003/manifest.json") and not repaired:
            failed.append(target)
            raise OSError("the connection was closed")
        put(source, target)

    monkeypatch.setattr(s3.filesystem, "put_file", failing_put)
    warnings: list[str] = []
    with Mirror(RunFolder.create_or_resume(config), config, warnings.append):
        run_here([TrainJob(with_values(config, {"train.max_steps": 3, "schedule.total_steps": 6}), prepare(config))])
        deadline = time.monotonic() + 120
        while len(failed) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        elsewhere = with_values(config, {"runs_dir": str(tmp_path / "elsewhere")})
        assert len(failed) >= 3
        assert not restore_from_mirror(elsewhere)  # nothing in the mirror is complete
        repaired.append(True)
    assert warnings == [
        f"the mirror s3://corpora/runs/torn cannot be written (the connection was closed): {warnings[0].split('): ', 1)[1]}"
    ]
    assert warnings[0].endswith("copying will be retried")
    assert restore_from_mirror(elsewhere)
    assert (elsewhere.run_dir / "checkpoints" / "step-00000003" / "manifest.json").exists()


@pytest.mark.slow
def test_a_job_writes_and_restores_its_mirror(ray: None, tiny: Config, tmp_path: Path) -> None:
    from engine.train.launch import train

    options = {
        "runs_dir": str(tmp_path),
        "name": "far",
        "train.mirror": str(tmp_path / "mirror"),
        "schedule.total_steps": 8,
    }
    config = with_values(tiny, options)
    before = train(config).last_metrics
    bundle = content(config.run_dir / "bundle")
    assert content(tmp_path / "mirror" / "far" / "bundle") == bundle
    shutil.rmtree(config.run_dir)
    assert train(config).last_metrics == before  # finished: no step is repeated
    assert content(config.run_dir / "bundle") == bundle
    shutil.rmtree(config.run_dir)
    longer = train(with_values(config, {"train.max_steps": 8})).last_metrics
    assert (longer["step"], longer["tokens"]) == (8, before["tokens"] * 8 // 6)

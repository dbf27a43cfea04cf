"""Converting checkpoints: which one is found, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import Config, with_values
from engine.errors import UserError
from engine.train.convert import export_checkpoint, find_checkpoint, import_universal
from engine.train.run_folder import RunFolder
from tests.engine.train.test_checkpoint import flip, write


def test_the_latest_checkpoint_or_that_of_a_step_is_found(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match="run 'one' has no checkpoint in "):
        find_checkpoint(run, None, "one")
    for step in (2, 4):
        write(run.checkpoints, step)
    assert find_checkpoint(run, None, "one").state.step == 4
    assert find_checkpoint(run, 2, "one").state.step == 2
    with pytest.raises(UserError, match=r"no checkpoint after 3 steps in .*: it has those after 2, 4"):
        find_checkpoint(run, 3, "one")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    flip(next(write(run.checkpoints, 2).glob("*.safetensors")))
    with pytest.raises(UserError, match=r"was changed.*: choose another with convert\.step="):
        find_checkpoint(run, 2, "one")


def test_a_run_without_training_cannot_be_exported_and_one_with_a_checkpoint_not_imported_to(
    tiny: Config, tmp_path: Path
) -> None:
    config = with_values(tiny, {"runs_dir": str(tmp_path), "name": "one"})
    run = RunFolder(config.run_dir)
    write(run.checkpoints, 2)
    with pytest.raises(UserError, match="has never trained"):
        export_checkpoint(config, run, find_checkpoint(run, 2, "one"))
    with pytest.raises(UserError, match=r"exists already: use another name="):
        import_universal(tmp_path / "universal", run, lambda done, total, name: None)

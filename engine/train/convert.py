"""The job `convert`: a run's checkpoint as a bundle or as DeepSpeed's universal checkpoint, and such a one as a run's."""

from __future__ import annotations

from pathlib import Path

import yaml

from engine.config import Config, from_dict, with_values
from engine.data.order import hash_hex
from engine.errors import UserError
from engine.progress import Bar, console
from engine.train import hardware
from engine.train.checkpoint import BrokenCheckpoint, Checkpoint, step_folder, step_folders
from engine.train.job import Job
from engine.train.run_folder import RunFolder
from engine.train.universal_checkpoint import Tell, read_universal, write_universal
from engine.train.worker import export
from engine.train.zero import DTYPES


def convert_and_show(config: Config) -> Path:
    """Convert as convert.* asks, with a bar, and print the folder that was written; return it."""
    run, asked = RunFolder(config.run_dir), config.convert
    with Bar("convert", total=100) as bar:

        def tell(done: int, total: int, name: str) -> None:
            bar.update(100 * done // total, name)

        if asked.to == "checkpoint":
            assert asked.folder is not None
            written = adopt(Path(asked.folder), run, tell)
        else:
            checkpoint = find(run, asked.step, config.name)
            if asked.to == "universal":
                written = write_universal(checkpoint, Path(asked.folder or run.path / "universal"), tell)
            else:
                written = to_bundle(config, run, checkpoint)
                bar.update(100, "")
    console.print(f"{asked.to:<9} {written}")
    return written


def find(run: RunFolder, step: int | None, name: str) -> Checkpoint:
    """Return a run's checkpoint after `step` steps (None: the latest), verified. Raises UserError, which says what there is."""
    there = step_folders(run.checkpoints)
    folder = step_folder(run.checkpoints, step) if step is not None else next(iter(there), None)
    if folder not in there:
        steps = ", ".join(f"{int(path.name.removeprefix('step-')):,}" for path in reversed(there))
        raise UserError(
            f"run '{name}' has no checkpoint{'' if step is None else f' after {step:,} steps'} in {run.checkpoints}"
            + (f": there are those after {steps}" if there else "")
        )
    try:
        checkpoint = Checkpoint(folder)
        checkpoint.verify()
    except BrokenCheckpoint as error:
        raise UserError(f"{error}: choose another with convert.step=...") from error
    return checkpoint


def to_bundle(config: Config, run: RunFolder, checkpoint: Checkpoint) -> Path:
    """Write the bundle of a checkpoint of a run, by the run's own config and data; return its folder."""
    status = run.status()
    if status is None or status.data is None or not run.config_file.is_file():
        raise UserError(
            f"run '{config.name}' has never trained, so its model and tokenizer are not known: manta pretrain name={config.name} goes on with its checkpoint"
        )
    own = with_values(from_dict(yaml.safe_load(run.config_file.read_text())), {"runs_dir": config.runs_dir})
    job = Job(own, Path(status.data), Path(status.parent) if status.parent else None)
    state, step = checkpoint.state, checkpoint.state.step
    bare = {"step": step, "tokens": state.tokens, "samples_hash": hash_hex(state.samples_hash)}
    line = next((line for line in run.metrics() if line["step"] == step), bare)
    dtype = DTYPES[hardware.precision(own.train)]
    target = Path(config.convert.folder or run.path / f"bundle-{step:08d}")
    if target.exists():  # it would be replaced
        raise UserError(f"{target} is there already: move it away, or use another convert.folder=...")
    export(job, job.objective(), checkpoint.folder, dtype, line, target)
    return target


def adopt(folder: Path, run: RunFolder, tell: Tell) -> Path:
    """Make a universal checkpoint the only one of a run; return its folder. Raises UserError for a run that has one already."""
    if there := step_folders(run.checkpoints):
        raise UserError(f"{there[0]} is there already: give the run that shall go on from {folder} another name=...")
    return read_universal(folder, run.checkpoints, tell).folder

"""The job `convert`: a run's checkpoint to a bundle or a DeepSpeed universal checkpoint, or such a checkpoint to a run's."""

from __future__ import annotations

from pathlib import Path

from engine.config import Config, from_dict, read_tree, with_values
from engine.data.order import hash_hex
from engine.errors import UserError
from engine.progress import ProgressBar, console
from engine.train import hardware
from engine.train.checkpoint import BrokenCheckpoint, Checkpoint, step_folder, step_folders
from engine.train.job import TrainJob
from engine.train.run_folder import RunFolder
from engine.train.universal_checkpoint import ProgressCallback, read_universal, write_universal
from engine.train.worker import export_bundle
from engine.train.zero import DTYPES


def convert_and_show(config: Config) -> Path:
    """Convert by the options convert.*, with a progress bar; print and return the folder that was written."""
    run, options = RunFolder(config.run_dir), config.convert
    with ProgressBar("convert", total=100) as bar:

        def show_progress(done: int, total: int, name: str) -> None:
            bar.update(100 * done // total, name)

        if options.to == "checkpoint":
            assert options.folder is not None
            written = import_universal(Path(options.folder), run, show_progress)
        else:
            checkpoint = find_checkpoint(run, options.step, config.name)
            if options.to == "universal":
                written = write_universal(checkpoint, Path(options.folder or run.path / "universal"), show_progress)
            else:
                written = export_checkpoint(config, run, checkpoint)
                bar.update(100, "")
    console.print(f"{options.to:<9} {written}")
    return written


def find_checkpoint(run: RunFolder, step: int | None, name: str) -> Checkpoint:
    """Return a run's verified checkpoint after `step` steps (None: the latest). Raises UserError that lists the existing ones."""
    folders = step_folders(run.checkpoints)
    folder = step_folder(run.checkpoints, step) if step is not None else next(iter(folders), None)
    if folder not in folders:
        steps = ", ".join(f"{int(path.name.removeprefix('step-')):,}" for path in reversed(folders))
        raise UserError(
            f"run '{name}' has no checkpoint{'' if step is None else f' after {step:,} steps'} in {run.checkpoints}"
            + (f": it has those after {steps}" if folders else "")
        )
    try:
        checkpoint = Checkpoint(folder)
        checkpoint.verify()
    except BrokenCheckpoint as error:
        raise UserError(f"{error}: choose another with convert.step=...") from error
    return checkpoint


def export_checkpoint(config: Config, run: RunFolder, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint of a run as a bundle, with the run's own config and data; return its folder."""
    status = run.status()
    if status is None or status.data is None or not run.config_file.is_file():
        raise UserError(
            f"run '{config.name}' has never trained, so its model and tokenizer are not known: manta pretrain name={config.name} continues from its checkpoint"
        )
    own = with_values(from_dict(read_tree(run.config_file)), {"runs_dir": config.runs_dir})
    job = TrainJob(own, Path(status.data), Path(status.parent) if status.parent else None)
    state, step = checkpoint.state, checkpoint.state.step
    minimal = {"step": step, "tokens": state.tokens, "samples_hash": hash_hex(state.samples_hash)}
    line = next((line for line in run.metrics() if line["step"] == step), minimal)
    dtype = DTYPES[hardware.precision(own.train)]
    target = Path(config.convert.folder or run.path / f"bundle-{step:08d}")
    if target.exists():  # it would be overwritten
        raise UserError(f"{target} exists already: move it away, or use another convert.folder=...")
    export_bundle(job, job.objective(), checkpoint.folder, dtype, line, target)
    return target


def import_universal(folder: Path, run: RunFolder, show_progress: ProgressCallback) -> Path:
    """Write a universal checkpoint as the first of a run; return its folder. Raises UserError if the run has one already."""
    if existing := step_folders(run.checkpoints):
        raise UserError(f"{existing[0]} exists already: use another name=... for the run that continues from {folder}")
    return read_universal(folder, run.checkpoints, show_progress).folder

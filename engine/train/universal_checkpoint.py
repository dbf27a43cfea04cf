"""Converts between our checkpoints and DeepSpeed's universal checkpoints.

    <root>/latest_universal                       holds the name of the folder below
    <root>/global_step200/
        mp_rank_00_model_states.pt                the train state, for ZeRO 1 and 2
        zero_pp_rank_0_mp_rank_00_model_states.pt the same, for ZeRO 3
        zero/optimizer_state.pt
        zero/<parameter>/fp32.pt exp_avg.pt exp_avg_sq.pt step.pt

The files are pickles, as DeepSpeed writes them. Reading them here never runs code from them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.atomic_write import atomic_folder
from engine.errors import UserError
from engine.train.checkpoint import Checkpoint, CheckpointWriter, step_folder
from engine.train.optimizer import MOMENTS
from engine.train.process_group import ProcessGroup
from engine.train.train_state import TrainState
from engine.train.zero import Fragment

ProgressCallback = Callable[[int, int, str], None]  # parameters done, parameters in total, name of the last one
LATEST = "latest_universal"
STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
FILES = {"weight": "fp32"} | {moment: moment for moment in MOMENTS[False]}  # AdamW's
SHARD_BYTES = 2**30  # held in memory at a time while reading


class PlaceholderObject:
    """Replaces DeepSpeed objects in a pickle that are not needed here, so that their classes are never loaded."""

    def __init__(self, *_: object) -> None:
        """Ignore the pickled arguments."""


PLACEHOLDER_CLASSES = [
    f"deepspeed.runtime.{name}"
    for name in ("fp16.loss_scaler.LossScaler", "fp16.loss_scaler.DynamicLossScaler", "zero.config.ZeroStageEnum")
]


def write_universal(checkpoint: Checkpoint, root: Path, on_progress: ProgressCallback) -> Path:
    """Write a checkpoint as a universal one under `root`; return its folder. Raises UserError if that exists already.

    DeepSpeed's `engine.load_checkpoint(root)` with {"checkpoint": {"load_universal": true}} loads it at ZeRO 1, 2 or 3, on
    any number of ranks. Optimizer options (learning rate, weight decay) stay those of the loading engine.
    """
    state = checkpoint.state
    target = root / f"global_step{state.step}"
    if target.exists():
        raise UserError(f"{target} exists already: move it away, or use another convert.folder=...")
    with atomic_folder(target) as part:
        updates = torch.tensor(float(state.updates))
        for done, name in enumerate(checkpoint.shapes):
            folder = part / "zero" / name
            folder.mkdir(parents=True)
            tensors = checkpoint.tensors(name)
            if tensors.keys() - {"weight"} and not tensors.keys() >= FILES.keys():
                raise UserError(
                    f"{checkpoint.folder} has no AdamW moments of {name}: DeepSpeed's format supports no other optimizer"
                )
            for kind, tensor in tensors.items():
                if kind in FILES:
                    torch.save({"param": tensor}, folder / f"{FILES[kind]}.pt")
            if len(tensors) > 1:
                torch.save(updates, folder / "step.pt")
            on_progress(done + 1, len(checkpoint.shapes), name)
        # One group per parameter, since DeepSpeed ignores parameters without one; empty, so that it overrides no option.
        groups: list[dict[str, Any]] = [{} for _ in checkpoint.shapes]
        optimizer_state = {"state": {0: {"step": updates}}, "param_groups": groups}
        common = {"ds_version": version("deepspeed"), "param_groups": groups, "optimizer_state_dict": optimizer_state}
        torch.save(common, part / "zero" / "optimizer_state.pt")
        model_state = {
            "module": {}, "param_shapes": [{name: torch.Size(shape) for name, shape in checkpoint.shapes.items()}],
            "global_steps": state.step, "global_samples": state.samples, "skipped_steps": state.skipped,
            "dp_world_size": 1, "mp_world_size": 1, "lr_scheduler": {"last_batch_iteration": state.step - 1},
        }  # fmt: skip
        for file in STATES:
            torch.save(model_state, part / file)
    (root / LATEST).write_text(target.name)
    return target


def read_universal(folder: Path, checkpoints: Path, on_progress: ProgressCallback) -> Checkpoint:
    """Write a universal checkpoint, given by its folder or the parent folder, as one of ours under `checkpoints`.

    Raises UserError if a file is missing or inconsistent, or if reading it would require running code.
    """
    source = UniversalCheckpoint.open(folder)
    shards = source.shards()
    done, total = 0, sum(len(names) for names in shards)

    def fragments(names: list[str]) -> Iterator[Fragment]:
        nonlocal done
        for name in names:
            yield source.fragment(name)
            done += 1
            on_progress(done, total, name)

    for rank in reversed(range(len(shards))):  # rank 0 last: it writes the manifest once all files exist
        writer = CheckpointWriter(checkpoints, rank, len(shards), keep=2**31)
        writer.save(fragments(shards[rank]), source.state, {"universal": str(source.folder)})
        writer.wait()
        if writer.has_failed:
            raise UserError(writer.clear_failure(ProcessGroup(0, 1, torch.device("cpu"))))
    return Checkpoint(step_folder(checkpoints, source.state.step))


@dataclass(frozen=True)
class UniversalCheckpoint:
    """A universal checkpoint on disk."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    state: TrainState

    @classmethod
    def open(cls, folder: Path) -> UniversalCheckpoint:
        """Read the train state and the shapes. Raises UserError for a folder that is no universal checkpoint."""
        latest = folder / LATEST
        if latest.is_file():
            folder = folder / latest.read_text().strip()
        file = next((folder / name for name in STATES if (folder / name).is_file()), None)
        names = sorted(path.parent.name for path in folder.glob("zero/*/fp32.pt"))
        if file is None or not names:
            raise UserError(
                f"{folder} is no universal checkpoint (zero/ and {STATES[0]}): make one with python -m deepspeed.checkpoint.ds_to_universal"
            )
        model_state = load_pickle(file)
        shapes: dict[str, tuple[int, ...]] = {}
        listed = model_state.get("param_shapes") or []
        for group in listed if isinstance(listed, list) else [listed]:
            shapes |= {name: tuple(shape) for name, shape in group.items()}
        if missing := sorted(shapes.keys() - set(names)):
            raise UserError(f"{folder} lacks zero/{missing[0]}/fp32.pt, which {file.name} lists: convert it again")
        steps = int(model_state["global_steps"])
        updates = cls._updates(folder, names, steps - int(model_state.get("skipped_steps", 0)))
        state = TrainState(step=steps, samples=int(model_state.get("global_samples", 0)), skipped=steps - updates)
        return cls(folder, {name: shapes.get(name, ()) for name in names}, state)

    @staticmethod
    def _updates(folder: Path, names: list[str], default: int) -> int:
        """Return the optimizer's step count: from a parameter's folder (ZeRO 1 and 2), or from the common state (ZeRO 3)."""
        step_files = (folder / "zero" / name / "step.pt" for name in names)
        if file := next((file for file in step_files if file.is_file()), None):
            return int(load_pickle(file))
        common = folder / "zero" / "optimizer_state.pt"
        states = load_pickle(common).get("optimizer_state_dict", {}).get("state", {}) if common.is_file() else {}
        return int(states[0]["step"]) if 0 in states and "step" in states[0] else default

    def shards(self) -> list[list[str]]:
        """Split the parameters into groups of about SHARD_BYTES."""
        groups: list[list[str]] = [[]]
        group_bytes = 0
        for name in self.shapes:
            size = sum(path.stat().st_size for path in (self.folder / "zero" / name).glob("*.pt"))
            if groups[-1] and group_bytes + size > SHARD_BYTES:
                groups.append([])
                group_bytes = 0
            groups[-1].append(name)
            group_bytes += size
        return groups

    def fragment(self, name: str) -> Fragment:
        """Return a parameter as one fragment, with its moments if it was trained."""
        folder = self.folder / "zero" / name
        tensors = {
            kind: full_tensor(load_pickle(folder / f"{file}.pt"))
            for kind, file in FILES.items()
            if (folder / f"{file}.pt").is_file()
        }
        shape = self.shapes[name] or tuple(tensors["weight"].shape)
        if len(tensors) not in (1, len(FILES)) or any(t.numel() != torch.Size(shape).numel() for t in tensors.values()):
            raise UserError(
                f"{folder} holds {sorted(tensors)}, of {tensors['weight'].numel():,} elements, for a parameter of shape {shape}: convert it again"
            )
        return Fragment(name, shape, 0, {kind: tensor.reshape(-1).float() for kind, tensor in tensors.items()})


def full_tensor(content: Any) -> Tensor:
    """Return the tensor in a parameter's file: under "param" (ZeRO 1 and 2), or the content itself (ZeRO 3)."""
    tensor: Tensor = content["param"] if isinstance(content, dict) else content
    return tensor


def load_pickle(file: Path) -> Any:
    """Read a pickle of tensors and plain values. Raises UserError for one that contains anything else."""
    try:
        with torch.serialization.safe_globals([(PlaceholderObject, name) for name in PLACEHOLDER_CLASSES]):  # type: ignore[list-item]  # (class, name) pairs are allowed
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{file} cannot be read: it is damaged, or contains more than tensors and plain values: {str(error).splitlines()[0][:200]}"
        ) from error

"""DeepSpeed's universal checkpoint: written from a checkpoint of ours, and read into one.

    <root>/latest_universal                       names the folder below
    <root>/global_step200/
        mp_rank_00_model_states.pt                how far training had come, for ZeRO 1 and 2
        zero_pp_rank_0_mp_rank_00_model_states.pt the same, for ZeRO 3
        zero/optimizer_state.pt
        zero/<parameter>/fp32.pt exp_avg.pt exp_avg_sq.pt step.pt

The files are pickles, as DeepSpeed has them. Those that are read here are never allowed to run code.
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
from engine.train.process_group import Group
from engine.train.optimizer import MOMENTS
from engine.train.train_state import TrainState
from engine.train.zero import Fragment

Tell = Callable[[int, int, str], None]  # parameters done, parameters in all, the last one's name
LATEST = "latest_universal"
STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
FILES = {"weight": "fp32"} | {moment: moment for moment in MOMENTS[False]}  # AdamW's
SHARD_BYTES = 2**30  # held in memory at a time while one is read


class Inert:
    """Stands for an object of DeepSpeed's in a pickle, of which nothing is needed: its class is never loaded."""

    def __init__(self, *_: object) -> None:
        """Take what the pickle gives."""


INERT = [
    f"deepspeed.runtime.{name}"
    for name in ("fp16.loss_scaler.LossScaler", "fp16.loss_scaler.DynamicLossScaler", "zero.config.ZeroStageEnum")
]


def write_universal(checkpoint: Checkpoint, root: Path, tell: Tell) -> Path:
    """Write a checkpoint as a universal one under `root`; return its folder. Raises UserError where that is there already.

    `engine.load_checkpoint(root)` with {"checkpoint": {"load_universal": true}} goes on from it, at ZeRO 1, 2 or 3, on any
    number of ranks. The options of the optimizer (learning rate, decay) stay those of the loading side.
    """
    state = checkpoint.state
    target = root / f"global_step{state.step}"
    if target.exists():
        raise UserError(f"{target} is there already: move it away, or use another convert.folder=...")
    with atomic_folder(target) as part:
        updates = torch.tensor(float(state.updates))
        for done, name in enumerate(checkpoint.shapes):
            folder = part / "zero" / name
            folder.mkdir(parents=True)
            tensors = checkpoint.tensors(name)
            if tensors.keys() - {"weight"} and not tensors.keys() >= FILES.keys():
                raise UserError(
                    f"{checkpoint.folder} holds no moments of AdamW for {name}: DeepSpeed's format has no others"
                )
            for kind, tensor in tensors.items():
                if kind in FILES:
                    torch.save({"param": tensor}, folder / f"{FILES[kind]}.pt")
            if len(tensors) > 1:
                torch.save(updates, folder / "step.pt")
            tell(done + 1, len(checkpoint.shapes), name)
        # A group for each parameter, as DeepSpeed leaves those out for which it finds none; empty, so that nothing is overruled.
        groups: list[dict[str, Any]] = [{} for _ in checkpoint.shapes]
        third = {"state": {0: {"step": updates}}, "param_groups": groups}
        common = {"ds_version": version("deepspeed"), "param_groups": groups, "optimizer_state_dict": third}
        torch.save(common, part / "zero" / "optimizer_state.pt")
        about = {
            "module": {}, "param_shapes": [{name: torch.Size(shape) for name, shape in checkpoint.shapes.items()}],
            "global_steps": state.step, "global_samples": state.samples, "skipped_steps": state.skipped,
            "dp_world_size": 1, "mp_world_size": 1, "lr_scheduler": {"last_batch_iteration": state.step - 1},
        }  # fmt: skip
        for file in STATES:
            torch.save(about, part / file)
    (root / LATEST).write_text(target.name)
    return target


def read_universal(folder: Path, checkpoints: Path, tell: Tell) -> Checkpoint:
    """Write a universal checkpoint, given by its folder or the one above, as one of ours under `checkpoints`.

    Raises UserError where something is missing, doesn't fit together, or could be read by running code only.
    """
    source = Universal.open(folder)
    shards = source.shards()
    done, total = 0, sum(len(names) for names in shards)

    def fragments(names: list[str]) -> Iterator[Fragment]:
        nonlocal done
        for name in names:
            yield source.fragment(name)
            done += 1
            tell(done, total, name)

    for rank in reversed(range(len(shards))):  # the first puts the manifest in place, once all are there
        writer = CheckpointWriter(checkpoints, rank, len(shards), keep=2**31)
        writer.save(fragments(shards[rank]), source.state, {"universal": str(source.folder)})
        writer.wait()
        if writer.failed:
            raise UserError(writer.clear_failed(Group(0, 1, torch.device("cpu"))))
    return Checkpoint(step_folder(checkpoints, source.state.step))


@dataclass(frozen=True)
class Universal:
    """A universal checkpoint on disk."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    state: TrainState

    @classmethod
    def open(cls, folder: Path) -> Universal:
        """Read how far training had come. Raises UserError for a folder that is no universal checkpoint."""
        latest = folder / LATEST
        if latest.is_file():
            folder = folder / latest.read_text().strip()
        file = next((folder / name for name in STATES if (folder / name).is_file()), None)
        names = sorted(path.parent.name for path in folder.glob("zero/*/fp32.pt"))
        if file is None or not names:
            raise UserError(
                f"{folder} is no universal checkpoint (zero/ and {STATES[0]}): make one with python -m deepspeed.checkpoint.ds_to_universal"
            )
        about = load(file)
        shapes: dict[str, tuple[int, ...]] = {}
        listed = about.get("param_shapes") or []
        for group in listed if isinstance(listed, list) else [listed]:
            shapes |= {name: tuple(shape) for name, shape in group.items()}
        if lost := sorted(shapes.keys() - set(names)):
            raise UserError(f"{folder} lacks zero/{lost[0]}/fp32.pt, which {file.name} lists: convert it again")
        steps = int(about["global_steps"])
        updates = cls._updates(folder, names, steps - int(about.get("skipped_steps", 0)))
        state = TrainState(step=steps, samples=int(about.get("global_samples", 0)), skipped=steps - updates)
        return cls(folder, {name: shapes.get(name, ()) for name in names}, state)

    @staticmethod
    def _updates(folder: Path, names: list[str], otherwise: int) -> int:
        """Return the optimizer's own step count: beside a parameter (ZeRO 1 and 2), or in the common state (ZeRO 3)."""
        beside = (folder / "zero" / name / "step.pt" for name in names)
        if file := next((file for file in beside if file.is_file()), None):
            return int(load(file))
        common = folder / "zero" / "optimizer_state.pt"
        states = load(common).get("optimizer_state_dict", {}).get("state", {}) if common.is_file() else {}
        return int(states[0]["step"]) if 0 in states and "step" in states[0] else otherwise

    def shards(self) -> list[list[str]]:
        """Split the parameters into runs of about SHARD_BYTES."""
        found: list[list[str]] = [[]]
        held = 0
        for name in self.shapes:
            size = sum(path.stat().st_size for path in (self.folder / "zero" / name).glob("*.pt"))
            if found[-1] and held + size > SHARD_BYTES:
                found.append([])
                held = 0
            found[-1].append(name)
            held += size
        return found

    def fragment(self, name: str) -> Fragment:
        """Return a parameter whole, its moments with it if it was trained."""
        folder = self.folder / "zero" / name
        tensors = {
            kind: whole(load(folder / f"{file}.pt"))
            for kind, file in FILES.items()
            if (folder / f"{file}.pt").is_file()
        }
        shape = self.shapes[name] or tuple(tensors["weight"].shape)
        if len(tensors) not in (1, len(FILES)) or any(t.numel() != torch.Size(shape).numel() for t in tensors.values()):
            raise UserError(
                f"{folder} holds {sorted(tensors)}, of {tensors['weight'].numel():,} elements, for a parameter of shape {shape}: convert it again"
            )
        return Fragment(name, shape, 0, {kind: tensor.reshape(-1).float() for kind, tensor in tensors.items()})


def whole(content: Any) -> Tensor:
    """Return the tensor of a parameter's file: under "param" (ZeRO 1 and 2), or bare (ZeRO 3)."""
    tensor: Tensor = content["param"] if isinstance(content, dict) else content
    return tensor


def load(file: Path) -> Any:
    """Read a pickle of tensors and plain values. Raises UserError for one that holds anything else."""
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in INERT]):  # type: ignore[list-item]  # (class, name) pairs are allowed
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{file} is refused, as it is damaged or holds more than tensors and plain values: {str(error).splitlines()[0][:200]}"
        ) from error

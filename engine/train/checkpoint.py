"""Layout-free checkpoints: fragments of fp32 master weights and moments with their offsets, and a manifest written last.

    checkpoints/step-00000200/
        rank-00000-of-00002.safetensors   flat fragments, keyed kind:name:start
        rank-00000-of-00002.json          the file's size, SHA-256 and the parameters' shapes
        manifest.json                     the train state and the list of files

A folder without a manifest is incomplete. Each rank writes its file in a background thread; training waits only for the
copy to host memory. Loading reads what a rank needs from whichever files hold it, at any world size and ZeRO stage.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.atomic_write import atomic_file, write_atomically
from engine.errors import UserError
from engine.hashing import sha256_file
from engine.train.process_group import ProcessGroup
from engine.train.run_folder import RunFolder
from engine.train.train_state import TrainState
from engine.train.zero import EMA, Fragment, ZeroModel

MANIFEST = "manifest.json"


class BrokenCheckpoint(Exception):
    """A checkpoint that is incomplete or was changed; the message names the file."""


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Return the folders of complete checkpoints, the latest first."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MANIFEST}")), reverse=True)


def latest_valid(run: RunFolder, group: ProcessGroup, only_good: bool = False) -> Checkpoint | None:
    """Return a run's latest checkpoint that all ranks find valid; invalid ones are reported.

    `only_good`: not one saved within a series of skipped steps. Raises UserError if there are checkpoints but none is valid.
    """
    if group.rank == 0:
        for path in remove_incomplete(run.checkpoints):
            run.report_event(f"{path} is an incomplete checkpoint: it is removed")
    group.barrier()
    broken: dict[Path, str] = {}
    for path in step_folders(run.checkpoints):
        fault = ""
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify(group.rank, group.world_size)
        except BrokenCheckpoint as error:
            fault = str(error)
            run.report_event(f"{fault}; the previous checkpoint is used")
        if group.all_reduce_ints(int(bool(fault)))[0]:
            broken[path] = fault or f"{path}: another rank found a fault"
        elif not (only_good and checkpoint.state.skipped_in_a_row):
            for folder in broken if group.rank == 0 else ():
                quarantine(folder)
            return checkpoint
    if broken:
        raise UserError(
            f"no checkpoint of {run.path} is valid ({next(iter(broken.values()))}): repair it, "
            "or use another name=... to start from scratch"
        )
    return None


def restore_model(model: ZeroModel, checkpoint: Checkpoint, rank: int) -> None:
    """Restore the weights, the moments and the optimizer's step count of a model in use, on all ranks at once."""
    model.init_optimizer_state(checkpoint.state.updates)
    checkpoint.load(model.fragments(rank, owned=False))
    model.load_master_weights()


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a partly deleted one does not look complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def quarantine(folder: Path) -> None:
    """Rename a broken checkpoint, to keep it for inspection and to free its name."""
    aside = folder.with_name(f"broken-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete incomplete checkpoints under `folder`; return their folders."""
    incomplete = [path for path in folder.glob("step-*") if not (path / MANIFEST).exists()]
    for path in incomplete:
        shutil.rmtree(path, ignore_errors=True)
    return incomplete


def file_sha256(file: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 (hex) that a safetensors file of these tensors must have, from its header and the tensors.

    Reads only the header of the file: its length in 8 bytes, then JSON with each tensor's offsets.
    """
    with file.open("rb") as written:
        length = written.read(8)
        header = written.read(int.from_bytes(length, "little"))
    digest = hashlib.sha256(length + header)
    offsets = {key: entry["data_offsets"][0] for key, entry in json.loads(header).items() if key != "__metadata__"}
    for key in sorted(tensors, key=lambda key: (offsets[key], tensors[key].numel())):
        digest.update(tensors[key].view(torch.uint8).numpy().data)
    return digest.hexdigest()


class CheckpointWriter:
    """Writes one rank's file of each checkpoint in the background.

    If the file cannot be written, a marker file tells rank 0 not to wait for it, and `has_failed` is set; the training loop
    exchanges that between the ranks, which then call `clear_failure` together.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, keep: int, keep_best: bool = False, wait_s: float = 600
    ) -> None:
        """Write under `folder` and keep the latest `keep` (and the best); rank 0 waits up to `wait_s` for the other ranks."""
        self.folder, self.rank, self.world_size, self.keep, self.wait_s = folder, rank, world_size, keep, wait_s
        self.keep_best = keep_best
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._error: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Whether this rank failed to write its file of a checkpoint."""
        return self._error is not None

    @property
    def is_copying(self) -> bool:
        """Whether the fragments being saved must not be changed yet."""
        return self._thread is not None and not self._copied.is_set()

    def save(self, fragments: Iterable[Fragment], state: TrainState, info: dict[str, Any]) -> None:
        """Start to write the fragments in the background, after the previous save has ended. `info` goes to the manifest.

        The fragments must not be changed before `wait_for_copy` has returned: they are copied to host memory during the next
        forward and backward pass, which only read them.
        """
        self.wait()
        if self._error is not None:
            self._mark_failed(step_folder(self.folder, state.step))
            return
        shapes: dict[str, list[int]] = {}
        live: dict[str, torch.Tensor] = {}
        for fragment in fragments:
            shapes[fragment.name] = list(fragment.shape)
            for kind, tensor in fragment.tensors.items():
                live[f"{kind}:{fragment.name}:{fragment.start}"] = tensor.detach()
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        if stream:
            stream.wait_stream(torch.cuda.current_stream())  # the optimizer update may still be running
        self._copied.clear()
        self._thread = threading.Thread(target=self._write, args=(live, stream, shapes, state, info), name="checkpoint")
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Wait until the fragments of the save in progress may be changed."""
        if self.is_copying:
            self._copied.wait()

    def _copy(self, live: dict[str, torch.Tensor], stream: Any) -> dict[str, torch.Tensor]:
        """Copy to host buffers that are reused between saves: allocating new pages would cost more than the copy."""
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            for key, tensor in live.items():
                if key not in self._buffers or self._buffers[key].numel() != tensor.numel():
                    self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[key].copy_(tensor, non_blocking=True)
        if stream:
            stream.synchronize()
        return {key: self._buffers[key] for key in live}

    def wait(self) -> None:
        """Wait until the save in progress is complete or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def clear_failure(self, group: ProcessGroup) -> str:
        """Reset after a save that failed on any rank, on all ranks at once, and delete its files; return the error message."""
        self.wait()
        error, self._error = self._error, None
        faults = [
            str(f)
            for entry in group.all_gather_arrays({"fault": np.array(str(error or ""))})
            if (f := entry["fault"].item())
        ]
        if self.rank == 0:
            remove_incomplete(self.folder)
        group.barrier()
        return f"the checkpoint could not be written to {self.folder}: {faults[0]}; the previous one is valid"

    def _write(
        self, live: dict[str, torch.Tensor], stream: Any, shapes: dict[str, list[int]], state: TrainState,
        info: dict[str, Any],
    ) -> None:  # fmt: skip
        target = step_folder(self.folder, state.step)
        try:
            try:
                tensors = self._copy(live, stream)
            finally:
                self._copied.set()
            target.mkdir(parents=True, exist_ok=True)
            file = target / f"rank-{self.rank:05d}-of-{self.world_size:05d}.safetensors"
            with atomic_file(file, fsync=True) as part:
                save_file(tensors, part)
            entry = {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file, tensors)}
            write_atomically(file.with_suffix(".json"), json.dumps(entry | {"shapes": shapes}), fsync=True)
            if self.rank == 0:
                self._commit(target, state, info)
        except Exception as error:  # reported by `has_failed`, in the caller's thread
            self._error = error
            self._mark_failed(target)

    def _mark_failed(self, target: Path) -> None:
        with contextlib.suppress(OSError):
            target.mkdir(parents=True, exist_ok=True)
            (target / f"rank-{self.rank:05d}.failed").touch()

    def _commit(self, target: Path, state: TrainState, info: dict[str, Any]) -> None:
        deadline = time.monotonic() + self.wait_s
        pattern = f"rank-*-of-{self.world_size:05d}.json"
        while len(parts := sorted(target.glob(pattern))) < self.world_size:
            if failed := sorted(target.glob("rank-*.failed")):
                raise OSError(f"{failed[0].stem} could not write its file")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"only {len(parts)} of {self.world_size} ranks wrote their file within {self.wait_s:.0f} s"
                )
            time.sleep(0.02)
        shapes: dict[str, list[int]] = {}
        files = []
        for path in parts:
            part = json.loads(path.read_text())
            shapes |= part.pop("shapes")
            files.append(part)
        content = {"format": 1, "state": asdict(state), "about": info, "shapes": shapes, "files": files}
        write_atomically(target / MANIFEST, json.dumps(content), fsync=True)
        if state.skipped_in_a_row:  # the last good checkpoint may be among the old ones
            return
        best = step_folder(self.folder, state.best_step) if self.keep_best else None
        for old in step_folders(self.folder)[self.keep :]:
            if old != best:
                remove_checkpoint(old)


@dataclass(frozen=True)
class StoredFragment:
    """Where a fragment of a parameter is stored."""

    start: int
    numel: int
    file: Path
    key: str


class Checkpoint:
    """A complete checkpoint, read fragment by fragment."""

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises BrokenCheckpoint, naming the file, if the manifest cannot be read."""
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            self.state = TrainState.from_dict(manifest["state"])
            self.info: dict[str, Any] = manifest["about"]
            self.shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
            self.files: list[dict[str, Any]] = manifest["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BrokenCheckpoint(f"{folder / MANIFEST} cannot be read ({error})") from error
        self._fragments: dict[tuple[str, str], list[StoredFragment]] | None = None

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Check size and SHA-256 of this rank's share of the files. Raises BrokenCheckpoint, naming the file."""
        for entry in self.files[rank::world_size]:
            path = self.folder / entry["file"]
            if not path.is_file():
                raise BrokenCheckpoint(f"{path} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise BrokenCheckpoint(f"{path} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}")
            if sha256_file(path) != entry["sha256"]:
                raise BrokenCheckpoint(f"{path} was changed: its SHA-256 differs from the manifest's")

    def copy_into(self, kind: str, name: str, start: int, target: torch.Tensor) -> None:
        """Fill the flat tensor `target` with the elements from `start` of a parameter's weight or moment."""
        end = start + target.numel()
        fragments = self._index()[kind, name]
        first = max(0, bisect.bisect_right([f.start for f in fragments], start) - 1)
        filled = 0
        for stored in fragments[first:]:
            low, high = max(start, stored.start), min(end, stored.start + stored.numel)
            if low >= high:
                break
            with safe_open(stored.file, framework="pt") as file:
                target[low - start : high - start].copy_(
                    file.get_slice(stored.key)[low - stored.start : high - stored.start]
                )
            filled += high - low
        if filled != target.numel():
            raise BrokenCheckpoint(f"{self.folder} lacks {target.numel() - filled:,} elements of {kind} {name}")

    def weights(self, kind: str = "weight") -> dict[str, torch.Tensor]:
        """Return the full fp32 tensor of every parameter, of this kind; the weight for parameters without that kind."""
        return {name: self._full(kind if (kind, name) in self._index() else "weight", name) for name in self.shapes}

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return all tensors of a parameter, kind -> full tensor: its weight, and its moments if it was trained."""
        return {kind: self._full(kind, name) for kind, parameter in self._index() if parameter == name}

    def _full(self, kind: str, name: str) -> torch.Tensor:
        flat = torch.empty(int(torch.Size(self.shapes[name]).numel()))
        self.copy_into(kind, name, 0, flat)
        return flat.view(self.shapes[name])

    def load(self, fragments: Iterable[Fragment]) -> None:
        """Overwrite a model's fragments. Raises UserError if the checkpoint is of another model or optimizer."""
        for fragment in fragments:
            if self.shapes.get(fragment.name) != fragment.shape:
                raise UserError(
                    f"{self.folder} holds another model ({fragment.name} is {self.shapes.get(fragment.name)} there, "
                    f"{fragment.shape} here): use another name, or the model's former options"
                )
            for kind, tensor in fragment.tensors.items():
                if (kind, fragment.name) in self._index():
                    self.copy_into(kind, fragment.name, fragment.start, tensor)
                elif kind == EMA:  # train.ema was turned on since: the average starts at the weights
                    self.copy_into("weight", fragment.name, fragment.start, tensor)
                else:
                    raise UserError(
                        f"{self.folder} was written by another optimizer (it has no {kind} of {fragment.name}): "
                        "use another name, or the former optim.name"
                    )

    def _index(self) -> dict[tuple[str, str], list[StoredFragment]]:
        if self._fragments is None:
            fragments: dict[tuple[str, str], list[StoredFragment]] = defaultdict(list)
            for entry in self.files:
                path = self.folder / entry["file"]
                try:
                    with safe_open(path, framework="pt") as file:
                        for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                            kind, rest = key.split(":", 1)
                            name, start = rest.rsplit(":", 1)
                            numel = file.get_slice(key).get_shape()[0]
                            fragments[kind, name].append(StoredFragment(int(start), numel, path, key))
                except (OSError, SafetensorError) as error:
                    raise BrokenCheckpoint(f"{path} cannot be read ({error})") from error
            for of_tensor in fragments.values():
                of_tensor.sort(key=lambda stored: stored.start)
            self._fragments = fragments
        return self._fragments

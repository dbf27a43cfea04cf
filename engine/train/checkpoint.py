"""Layout-free checkpoints: pieces of fp32 master weights and moments with their offsets, and a manifest put in place last.

    checkpoints/step-00000200/
        rank-00000-of-00002.safetensors   flat pieces, keyed kind:name:start
        rank-00000-of-00002.json          the file's size, SHA-256 and the parameters' shapes
        manifest.json                     the train state and all files; renamed into place last

A folder without a manifest is no checkpoint. Each rank writes its own file in a thread of its own; the step waits only
for the copy to host memory. Loading takes what a rank needs from whichever files hold it, at any world size and stage.
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
from engine.train.process_group import Group
from engine.train.run_folder import RunFolder
from engine.train.train_state import TrainState
from engine.train.zero import AVERAGE, Fragment, ZeroModel

MANIFEST = "manifest.json"


class BrokenCheckpoint(Exception):
    """A checkpoint that is torn or was changed; the message names the file."""


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Return the folders of complete checkpoints, latest first."""
    return sorted((path.parent for path in folder.glob(f"step-*/{MANIFEST}")), reverse=True)


def latest_whole(run: RunFolder, group: Group, good: bool = False) -> Checkpoint | None:
    """Return a run's latest checkpoint that is whole, by all ranks' word; what is passed over for it is told by name.

    `good`: leave out those within a row of skipped steps. Raises UserError where there are some and none is whole.
    """
    if group.rank == 0:
        for path in remove_unfinished(run.checkpoints):
            run.tell(f"{path} was never finished: it is removed")
    group.barrier()
    broken: dict[Path, str] = {}
    for path in step_folders(run.checkpoints):
        fault = ""
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify(group.rank, group.world)
        except BrokenCheckpoint as error:
            fault = str(error)
            run.tell(f"{fault}; the checkpoint before it is used")
        if group.sum_integers(int(bool(fault)))[0]:
            broken[path] = fault or f"{path}: another rank found a fault"
        elif not (good and checkpoint.state.skipped_in_a_row):
            for old in broken if group.rank == 0 else ():
                set_aside(old)
            return checkpoint
    if broken:
        raise UserError(
            f"no checkpoint of {run.path} is whole ({next(iter(broken.values()))}): mend it, "
            "or use another name=... to start afresh"
        )
    return None


def restore(model: ZeroModel, checkpoint: Checkpoint, rank: int) -> None:
    """Put a running model, its moments and its optimizer's step count back to a checkpoint, on all ranks at once."""
    model.ensure_moments(checkpoint.state.updates)
    checkpoint.load(model.fragments(rank, owned=False))
    model.adopt_masters()


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that no half of it looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Keep a broken checkpoint for a look at it, out of the way of the one that will be written for that step."""
    aside = folder.with_name(f"broken-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete what was begun under `folder` and never finished; return what that was."""
    unfinished = [path for path in folder.glob("step-*") if not (path / MANIFEST).exists()]
    for path in unfinished:
        shutil.rmtree(path, ignore_errors=True)
    return unfinished


def file_sha256(file: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 (hex) that a safetensors file of these tensors must have: its header's and the tensors' bytes.

    The header (8 bytes of its length, then JSON with each tensor's offsets) is all that is read of the file.
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
    """Saves one rank's part of each checkpoint while training goes on.

    A part that cannot be written leaves a file that says so, for rank 0 not to wait for it, and `failed` set: the ranks
    tell each other and call `clear_failed` together.
    """

    def __init__(
        self, folder: Path, rank: int, world: int, keep: int, keep_best: bool = False, wait_s: float = 600
    ) -> None:
        """Write under `folder`, keep the latest `keep` (and the best); rank 0 waits `wait_s` seconds for the others' parts."""
        self.folder, self.rank, self.world, self.keep, self.wait_s = folder, rank, world, keep, wait_s
        self.keep_best = keep_best
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of a checkpoint."""
        return self._error is not None

    @property
    def copying(self) -> bool:
        """Whether the fragments of a save may not be changed yet."""
        return self._thread is not None and not self._copied.is_set()

    def save(self, fragments: Iterable[Fragment], state: TrainState, about: dict[str, Any]) -> None:
        """Begin to write the fragments behind the caller's back, once the save before is in place.

        They may not be changed before `hold` has returned: they are copied to host memory beside the next forward and
        backward pass, which only read them.
        """
        self.wait()
        if self._error is not None:
            self._say_failed(step_folder(self.folder, state.step))
            return
        shapes: dict[str, list[int]] = {}
        live: dict[str, torch.Tensor] = {}
        for fragment in fragments:
            shapes[fragment.name] = list(fragment.shape)
            for kind, tensor in fragment.tensors.items():
                live[f"{kind}:{fragment.name}:{fragment.start}"] = tensor.detach()
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        if stream:
            stream.wait_stream(torch.cuda.current_stream())  # the update that is still under way
        self._copied.clear()
        self._thread = threading.Thread(
            target=self._write, args=(live, stream, shapes, state, about), name="checkpoint"
        )
        self._thread.start()

    def hold(self) -> None:
        """Wait until the fragments of the save under way may be changed."""
        if self.copying:
            self._copied.wait()

    def _copy(self, live: dict[str, torch.Tensor], stream: Any) -> dict[str, torch.Tensor]:
        """Copy into host memory that is kept from save to save: fresh pages would cost more than the copy."""
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            for key, tensor in live.items():
                if key not in self._buffers or self._buffers[key].numel() != tensor.numel():
                    self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[key].copy_(tensor, non_blocking=True)
        if stream:
            stream.synchronize()
        return {key: self._buffers[key] for key in live}

    def wait(self) -> None:
        """Wait until the save under way is in place, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def clear_failed(self, group: Group) -> str:
        """Forget a save that any rank could not write, on all ranks at once, and free its room; return what went wrong."""
        self.wait()
        error, self._error = self._error, None
        faults = [
            str(f) for entry in group.gather({"fault": np.array(str(error or ""))}) if (f := entry["fault"].item())
        ]
        if self.rank == 0:
            remove_unfinished(self.folder)
        group.barrier()
        return f"the checkpoint could not be written to {self.folder}: {faults[0]}; the one before it is whole"

    def _write(
        self, live: dict[str, torch.Tensor], stream: Any, shapes: dict[str, list[int]], state: TrainState,
        about: dict[str, Any],
    ) -> None:  # fmt: skip
        target = step_folder(self.folder, state.step)
        try:
            try:
                tensors = self._copy(live, stream)
            finally:
                self._copied.set()
            target.mkdir(parents=True, exist_ok=True)
            file = target / f"rank-{self.rank:05d}-of-{self.world:05d}.safetensors"
            with atomic_file(file, fsync=True) as part:
                save_file(tensors, part)
            entry = {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file, tensors)}
            write_atomically(file.with_suffix(".json"), json.dumps(entry | {"shapes": shapes}), fsync=True)
            if self.rank == 0:
                self._commit(target, state, about)
        except Exception as error:  # told by `failed`, in the caller's thread
            self._error = error
            self._say_failed(target)

    def _say_failed(self, target: Path) -> None:
        with contextlib.suppress(OSError):
            target.mkdir(parents=True, exist_ok=True)
            (target / f"rank-{self.rank:05d}.failed").touch()

    def _commit(self, target: Path, state: TrainState, about: dict[str, Any]) -> None:
        deadline = time.monotonic() + self.wait_s
        pattern = f"rank-*-of-{self.world:05d}.json"
        while len(parts := sorted(target.glob(pattern))) < self.world:
            if failed := sorted(target.glob("rank-*.failed")):
                raise OSError(f"{failed[0].stem} could not write its part")
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"only {len(parts)} of {self.world} ranks wrote their part within {self.wait_s:.0f} s"
                )
            time.sleep(0.02)
        shapes: dict[str, list[int]] = {}
        files = []
        for path in parts:
            part = json.loads(path.read_text())
            shapes |= part.pop("shapes")
            files.append(part)
        content = {"format": 1, "state": asdict(state), "about": about, "shapes": shapes, "files": files}
        write_atomically(target / MANIFEST, json.dumps(content), fsync=True)
        if state.skipped_in_a_row:  # the last good one may be among the old
            return
        best = step_folder(self.folder, state.best_step) if self.keep_best else None
        for old in step_folders(self.folder)[self.keep :]:
            if old != best:
                remove(old)


@dataclass(frozen=True)
class Piece:
    """Where a flat piece of a parameter lies."""

    start: int
    numel: int
    file: Path
    key: str


class Checkpoint:
    """A complete checkpoint, read piece by piece."""

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises BrokenCheckpoint, naming the file, for a manifest that can't be read."""
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            state = manifest["state"]
            self.state = TrainState(**state | {"recent": tuple(state.get("recent", ()))})
            self.about: dict[str, Any] = manifest["about"]
            self.shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
            self.files: list[dict[str, Any]] = manifest["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BrokenCheckpoint(f"{folder / MANIFEST} cannot be read ({error})") from error
        self._pieces: dict[tuple[str, str], list[Piece]] | None = None

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """Check this rank's share of the files. Raises BrokenCheckpoint that names the file."""
        for entry in self.files[rank::world]:
            path = self.folder / entry["file"]
            if not path.is_file():
                raise BrokenCheckpoint(f"{path} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise BrokenCheckpoint(f"{path} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}")
            if sha256_file(path) != entry["sha256"]:
                raise BrokenCheckpoint(f"{path} was changed: its SHA-256 is not the recorded one")

    def copy(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Fill the flat tensor `into` with elements start... of a parameter's weight or moment."""
        end = start + into.numel()
        pieces = self._index()[kind, name]
        first = max(0, bisect.bisect_right([p.start for p in pieces], start) - 1)
        filled = 0
        for piece in pieces[first:]:
            low, high = max(start, piece.start), min(end, piece.start + piece.numel)
            if low >= high:
                break
            with safe_open(piece.file, framework="pt") as file:
                into[low - start : high - start].copy_(
                    file.get_slice(piece.key)[low - piece.start : high - piece.start]
                )
            filled += high - low
        if filled != into.numel():
            raise BrokenCheckpoint(f"{self.folder} lacks {into.numel() - filled:,} elements of {kind} {name}")

    def weights(self, kind: str = "weight") -> dict[str, torch.Tensor]:
        """Return every parameter whole, in fp32; those without a tensor of the `kind` as they are."""
        return {name: self._whole(kind if (kind, name) in self._index() else "weight", name) for name in self.shapes}

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return all that is kept of a parameter, kind -> whole tensor: its weight, and its moments if it was trained."""
        return {kind: self._whole(kind, name) for kind, of in self._index() if of == name}

    def _whole(self, kind: str, name: str) -> torch.Tensor:
        flat = torch.empty(int(torch.Size(self.shapes[name]).numel()))
        self.copy(kind, name, 0, flat)
        return flat.view(self.shapes[name])

    def load(self, fragments: Iterable[Fragment]) -> None:
        """Overwrite live fragments. Raises UserError where the model isn't the one that was saved."""
        for fragment in fragments:
            if self.shapes.get(fragment.name) != fragment.shape:
                raise UserError(
                    f"{self.folder} holds another model ({fragment.name} is {self.shapes.get(fragment.name)} there, "
                    f"{fragment.shape} here): use another name, or the model's former options"
                )
            for kind, tensor in fragment.tensors.items():
                if (kind, fragment.name) in self._index():
                    self.copy(kind, fragment.name, fragment.start, tensor)
                elif kind == AVERAGE:  # asked for since: it begins with the weights
                    self.copy("weight", fragment.name, fragment.start, tensor)
                else:
                    raise UserError(
                        f"{self.folder} was written by another optimizer (it has no {kind} of {fragment.name}): "
                        "use another name, or the former optim.name"
                    )

    def _index(self) -> dict[tuple[str, str], list[Piece]]:
        if self._pieces is None:
            pieces: dict[tuple[str, str], list[Piece]] = defaultdict(list)
            for entry in self.files:
                path = self.folder / entry["file"]
                try:
                    with safe_open(path, framework="pt") as file:
                        for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                            kind, rest = key.split(":", 1)
                            name, start = rest.rsplit(":", 1)
                            numel = file.get_slice(key).get_shape()[0]
                            pieces[kind, name].append(Piece(int(start), numel, path, key))
                except (OSError, SafetensorError) as error:
                    raise BrokenCheckpoint(f"{path} cannot be read ({error})") from error
            for found in pieces.values():
                found.sort(key=lambda piece: piece.start)
            self._pieces = pieces
        return self._pieces

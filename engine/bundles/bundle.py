"""A bundle: a Hugging Face folder plus `manta.json`, which says where the model came from and how to know it again.

The folder loads with plain `from_pretrained` of transformers or diffusers, with nothing of Manta installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from engine.atomic_write import atomic_folder
from engine.bundles.card import CARD, original_card, verify_card, write_card
from engine.config import ObjectiveConfig, group
from engine.data.packing import Packing
from engine.data.processor import load_processor
from engine.errors import UserError
from engine.hashing import sha256_file
from engine.models.build import load_for_inference
from engine.models.int8 import is_quantized
from engine.objectives.contract import Objective, objective_class, objective_for_architecture

MANIFEST = "manta.json"
Predict = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of a replayed (log-)probability: other kernels round otherwise
WRITTEN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
ROUGH = 0.2  # the same where the model runs in another precision than it was written in
IN_8_BITS = 0.5  # of a log-probability, with weights that are off by up to a 254th of the largest of their output


@dataclass(frozen=True)
class Manifest:
    """What a bundle knows of itself."""

    name: str
    objective: dict[str, Any]  # ObjectiveConfig
    labels: list[str]
    sequence_length: int  # tokens
    parent: str | None  # hash of the bundle that it was trained from
    data: dict[str, str] | None  # folder and hash of the prepared data
    config_hash: str | None
    run: dict[str, Any] | None  # name, step, samples_hash
    evaluation: dict[str, Any]
    golden: list[dict[str, Any]]  # [{"request", "output"}], replayed before a replica takes traffic
    files: dict[str, str]  # file -> SHA-256
    versions: dict[str, str]
    license: str = "not stated"
    created: str = ""
    format: int = 1
    hash: str = field(default="")  # SHA-256 over all other fields
    training: dict[str, Any] | None = None  # job, config (dotted key -> value), tokens, energy; None: not known

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) of everything else in the manifest, the files' hashes among it."""
        content = asdict(replace(self, hash=""))
        if self.training is None:  # a bundle from before this field was known keeps its hash
            del content["training"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A model folder, of ours or of Hugging Face."""

    folder: Path
    manifest: Manifest | None  # None: a plain Hugging Face folder

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Open a folder. Raises UserError where it holds no model, or a manifest that can't be read."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} holds no model (no config.json): give a bundle's or a Hugging Face model's folder"
            )
        file = folder / MANIFEST
        if not file.exists():
            return cls(folder, None)
        try:
            return cls(folder, Manifest(**json.loads(file.read_text())))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): restore it, or write the bundle again") from error

    @property
    def has_manifest(self) -> bool:
        """Whether this is a bundle of ours, with a manifest."""
        return self.manifest is not None

    @property
    def hash(self) -> str:
        """The manifest's hash; of a plain folder, the hash of its files."""
        if self.manifest:
            return self.manifest.hash
        return hashlib.sha256(json.dumps(_file_hashes(self.folder), sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Check every file. Raises UserError that names the one that was changed, is missing or came in addition."""
        if not self.manifest:
            return
        if self.manifest.hash != self.manifest.content_hash():
            raise UserError(f"{self.folder / MANIFEST} was changed since the bundle was written: refused")
        now = _file_hashes(self.folder)
        if CARD in self.manifest.files and CARD in now:  # the rest of it is a chain from the manifest's hash
            now[CARD] = hashlib.sha256(original_card(self.folder / CARD)).hexdigest()
        for name, expected in self.manifest.files.items():
            if name not in now:
                raise UserError(f"{self.folder / name} is missing: the bundle is refused")
            if now[name] != expected:
                raise UserError(f"{self.folder / name} was changed since the bundle was written: refused")
        if added := sorted(set(now) - set(self.manifest.files)):
            raise UserError(f"{self.folder / added[0]} was added since the bundle was written: refused")
        verify_card(self.folder, self.manifest.hash)

    def processor(self) -> Any:
        """Load the tokenizer, the image processor, or what holds both; a tokenizer without padding pads with its end of text."""
        processor = load_processor(self.folder)
        tokenizer = getattr(processor, "tokenizer", processor)
        if getattr(tokenizer, "pad_token_id", 0) is None:
            tokenizer.pad_token = tokenizer.eos_token
        return processor

    def objective(self, packing: Packing | None = None) -> Objective:
        """Return the task that the model was trained for; of a plain folder, what its architecture is for."""
        if self.manifest:
            options = self._options(self.manifest.objective)
            labels, length = self.manifest.labels, self.manifest.sequence_length
        else:
            config = json.loads((self.folder / "config.json").read_text())
            architecture = next(iter(config.get("architectures") or []), "")
            name = objective_for_architecture(architecture)
            if name is None:
                raise UserError(
                    f"{self.folder} is a {architecture or 'model without a head'}: fine-tune it first (manta finetune bundle=...)"
                )
            positions = (config.get("text_config") or config).get("max_position_embeddings")
            options, length = ObjectiveConfig(name=name), int(positions or 512)
            labels = [label for _, label in sorted(config.get("id2label", {}).items(), key=lambda item: int(item[0]))]
        return objective_class(options.name)(options, self.processor(), length, labels, packing)

    def _options(self, recorded: dict[str, Any]) -> ObjectiveConfig:
        """Return the recorded options of the task. Raises UserError for one that is set and isn't known here."""
        known = {option.name for option in fields(ObjectiveConfig)}
        if unknown := sorted(name for name in recorded.keys() - known if recorded[name] is not None):
            raise UserError(
                f"{self.folder} was written by another version: objective.{unknown[0]} isn't known to this one"
            )
        return group(ObjectiveConfig, {name: value for name, value in recorded.items() if name in known})

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the model for inference, in its own precision or in `dtype`."""
        return load_for_inference(self.folder, self.objective().auto_class, dtype)

    def saved_dtype(self) -> torch.dtype:
        """Return the precision of the weights in the files."""
        with safe_open(min(self.folder.glob("*.safetensors")), "pt") as opened:
            return WRITTEN[opened.get_slice(next(iter(opened.keys()))).get_dtype()]

    def replay(self, model: nn.Module) -> None:
        """Ask a model the golden requests again. Raises UserError for the first answer that is not the recorded one."""
        dtype = next(model.parameters()).dtype
        self.replay_with(lambda requests: self.objective().predict(model, requests), dtype, is_quantized(model))

    def replay_with(self, predict: Predict, dtype: torch.dtype, is_quantized: bool = False) -> None:
        """The same, of whatever answers as the objective's `predict` does, with a model in that precision."""
        if not self.manifest:
            return
        requests = [golden["request"] for golden in self.manifest.golden]
        outputs = predict(requests) if requests else []
        tolerance = TOLERANCE.get(dtype, ROUGH) if dtype == self.saved_dtype() else ROUGH
        if is_quantized:
            tolerance = IN_8_BITS if self.objective().has_lm_head else ROUGH
        for golden, output in zip(self.manifest.golden, outputs, strict=True):
            # Near numbers can be asked for; equal words can't, where rounding decides between two that are as likely.
            recorded, answer = _numbers(golden["output"]), _numbers(output)
            if len(recorded) != len(answer) or not all(abs(a - b) <= tolerance for a, b in zip(recorded, answer)):
                how = " with 8-bit weights (leave serve.quantize out)" if is_quantized else ""
                raise UserError(
                    f"{self.folder} does not answer as recorded{how}: {golden['request']} gives {output}, not {golden['output']}"
                )


def write_bundle(
    folder: Path,
    *,
    model: nn.Module,
    objective: Objective,
    name: str,
    golden_requests: list[dict[str, Any]],
    parent: str | None = None,
    data: dict[str, str] | None = None,
    config_hash: str | None = None,
    run: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    license: str = "not stated",
    dtype: torch.dtype = torch.float32,
    training: dict[str, Any] | None = None,
    words: dict[str, str] | None = None,
) -> Bundle:
    """Write a bundle in `dtype` and record what it answers to `golden_requests`; it is renamed into place last.

    `training` and `words` (intended_use, limits) are what its card tells beside what the manifest holds.
    """
    model = model.to(dtype).eval()
    golden = [
        {"request": request, "output": output}
        for request, output in zip(golden_requests, objective.predict(model, golden_requests), strict=True)
    ]
    manifest = Manifest(
        name=name,
        objective=asdict(objective.options),
        labels=objective.labels,
        sequence_length=objective.sequence_length,
        parent=parent,
        data=data,
        config_hash=config_hash,
        run=run,
        evaluation=evaluation or {},
        golden=golden,
        files={},
        versions={
            package: _version(package)
            for package in ("manta-train", "torch", "transformers", *objective.required_packages)
        },
        license=license,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        training=training,
    )
    facts = asdict(manifest) | {"parameters": sum(p.numel() for p in model.parameters()), "auto": objective.auto_class}
    with atomic_folder(folder) as part:
        model.save_pretrained(part)  # type: ignore[operator]
        objective.save(part)
        write_card(part, facts, words or {})
        manifest = replace(manifest, files=_file_hashes(part))
        manifest = replace(manifest, hash=manifest.content_hash())
        (part / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return Bundle(folder, manifest)


def _file_hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            hashes[str(path.relative_to(folder))] = sha256_file(path)
    return hashes


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _numbers(output: Any) -> list[float]:
    """Return the floating-point numbers in an output, in its order."""
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list):
        return [number for part in output for number in _numbers(part)]
    return [output] if isinstance(output, float) else []

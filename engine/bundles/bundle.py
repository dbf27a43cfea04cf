"""A bundle: a Hugging Face folder plus `manta.json`, which records where the model came from and how to verify it.

The folder loads with plain `from_pretrained` of transformers or diffusers, without Manta installed.
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
from engine.bundles.model_card import CARD, CardContent, original_card, verify_card, write_card
from engine.config import ObjectiveConfig, group
from engine.data.packing import Packing
from engine.data.processor import load_processor
from engine.errors import UserError
from engine.hashing import sha256_file
from engine.models.build import load_for_inference
from engine.models.int8 import is_quantized
from engine.objectives.contract import Objective, objective_class, objective_for_architecture

MANIFEST = "manta.json"
FORMAT = 2  # of new manifests; 1 spelled the key `license` as `licence`
Predict = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' name
# Largest allowed difference between a recorded and a replayed (log-)probability: other kernels round differently.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # by the dtype that the bundle is saved and replayed in
TOLERANCE_OTHER_DTYPE = 0.2  # replayed in another dtype than the saved one
TOLERANCE_INT8 = 0.5  # of a log-probability: quantized weights are off by up to 1/254 of their output channel's largest


@dataclass(frozen=True)
class Manifest:
    """The contents of manta.json."""

    name: str
    objective: dict[str, Any]  # ObjectiveConfig
    labels: list[str]
    sequence_length: int  # tokens
    parent: str | None  # hash of the bundle that training started from
    data: dict[str, str] | None  # folder and hash of the prepared data
    config_hash: str | None
    run: dict[str, Any] | None  # name, step, samples_hash
    evaluation: dict[str, Any]
    golden: list[dict[str, Any]]  # [{"request", "output"}], replayed before a replica serves requests
    files: dict[str, str]  # file -> SHA-256
    versions: dict[str, str]
    license: str = "not stated"
    created: str = ""
    format: int = FORMAT
    hash: str = field(default="")  # SHA-256 over all other fields
    training: dict[str, Any] | None = None  # job, config (dotted key -> value), tokens, energy; None: not recorded

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Manifest:
        """Read the content of manta.json, of any format. Raises TypeError for unknown or missing keys."""
        if content.get("format") == 1 and "licence" in content:
            content = {"license" if key == "licence" else key: value for key, value in content.items()}
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of manta.json in the manifest's own format, which its hash covers."""
        content = asdict(self)
        if self.format == 1:
            content = {"licence" if key == "license" else key: value for key, value in content.items()}
        return content

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) of everything else in the manifest, including the hashes of the files."""
        content = replace(self, hash="").to_dict()
        if self.training is None:  # the first bundles had no such key
            del content["training"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class BundleInfo:
    """What a new bundle's manifest and model card say beside what the model and its objective tell."""

    name: str
    golden_requests: list[dict[str, Any]]  # the model's outputs are recorded, and replayed before serving
    parent: str | None = None  # as in `Manifest`, here and below
    data: dict[str, str] | None = None
    config_hash: str | None = None
    run: dict[str, Any] | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    license: str = "not stated"
    training: dict[str, Any] | None = None
    intended_use: str = ""  # the author's own words for the card; empty: a default sentence
    limits: str = ""


@dataclass(frozen=True)
class Bundle:
    """A model folder, written by Manta or by Hugging Face's tools."""

    folder: Path
    manifest: Manifest | None  # None: a plain Hugging Face folder

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Open a folder. Raises UserError if it holds no model, or if its manifest cannot be read."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} holds no model (no config.json): give the folder of a bundle or of a Hugging Face model"
            )
        file = folder / MANIFEST
        if not file.exists():
            return cls(folder, None)
        try:
            return cls(folder, Manifest.from_dict(json.loads(file.read_text())))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): restore it, or write the bundle again") from error

    @property
    def has_manifest(self) -> bool:
        """Whether Manta wrote this bundle."""
        return self.manifest is not None

    @property
    def hash(self) -> str:
        """The manifest's hash; of a plain folder, the hash of its files."""
        if self.manifest:
            return self.manifest.hash
        return hashlib.sha256(json.dumps(_file_hashes(self.folder), sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Check the hash of every file. Raises UserError that names a changed, missing or additional file."""
        if not self.manifest:
            return
        if self.manifest.hash != self.manifest.content_hash():
            raise UserError(f"{self.folder / MANIFEST} was changed since the bundle was written: refused")
        hashes = _file_hashes(self.folder)
        if CARD in self.manifest.files and CARD in hashes:  # evaluations added later are checked by `verify_card`
            hashes[CARD] = hashlib.sha256(original_card(self.folder / CARD)).hexdigest()
        for name, expected in self.manifest.files.items():
            if name not in hashes:
                raise UserError(f"{self.folder / name} is missing: the bundle is refused")
            if hashes[name] != expected:
                raise UserError(f"{self.folder / name} was changed since the bundle was written: refused")
        if added := sorted(set(hashes) - set(self.manifest.files)):
            raise UserError(f"{self.folder / added[0]} was added since the bundle was written: refused")
        verify_card(self.folder, self.manifest.hash)

    def processor(self) -> Any:
        """Load the tokenizer, the image processor, or the processor that holds both.

        A tokenizer without a padding token pads with its end-of-text token.
        """
        processor = load_processor(self.folder)
        tokenizer = getattr(processor, "tokenizer", processor)
        if getattr(tokenizer, "pad_token_id", 0) is None:
            tokenizer.pad_token = tokenizer.eos_token
        return processor

    def objective(self, packing: Packing | None = None) -> Objective:
        """Return the objective that the model was trained for; of a plain folder, the one that its architecture is for."""
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
        """Return the recorded options of the objective. Raises UserError for an unknown one that is set."""
        known = {option.name for option in fields(ObjectiveConfig)}
        if unknown := sorted(name for name in recorded.keys() - known if recorded[name] is not None):
            raise UserError(
                f"{self.folder} was written by another version of Manta: objective.{unknown[0]} is unknown to this one"
            )
        return group(ObjectiveConfig, {name: value for name, value in recorded.items() if name in known})

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Load the model for inference, in the saved dtype or in `dtype`."""
        return load_for_inference(self.folder, self.objective().auto_class, dtype)

    def saved_dtype(self) -> torch.dtype:
        """Return the dtype of the weights in the files."""
        with safe_open(min(self.folder.glob("*.safetensors")), "pt") as opened:
            return SAFETENSORS_DTYPES[opened.get_slice(next(iter(opened.keys()))).get_dtype()]

    def replay(self, model: nn.Module) -> None:
        """Run the golden requests through a model. Raises UserError for the first output that differs from the recorded one."""
        dtype = next(model.parameters()).dtype
        self.replay_with(lambda requests: self.objective().predict(model, requests), dtype, is_quantized(model))

    def replay_with(self, predict: Predict, dtype: torch.dtype, is_quantized: bool = False) -> None:
        """Replay the golden requests through `predict`, which runs a model in `dtype`. Raises UserError as `replay` does."""
        if not self.manifest:
            return
        requests = [golden["request"] for golden in self.manifest.golden]
        outputs = predict(requests) if requests else []
        same_dtype = dtype == self.saved_dtype()
        tolerance = TOLERANCE.get(dtype, TOLERANCE_OTHER_DTYPE) if same_dtype else TOLERANCE_OTHER_DTYPE
        if is_quantized:
            tolerance = TOLERANCE_INT8 if self.objective().has_lm_head else TOLERANCE_OTHER_DTYPE
        for golden, output in zip(self.manifest.golden, outputs, strict=True):
            # Only numbers are compared: where rounding decides between two equally likely tokens, the text may differ.
            expected, actual = _numbers(golden["output"]), _numbers(output)
            if len(expected) != len(actual) or not all(abs(a - b) <= tolerance for a, b in zip(expected, actual)):
                how = " with 8-bit weights (leave out serve.quantize)" if is_quantized else ""
                raise UserError(
                    f"{self.folder} does not reproduce its golden outputs{how}: "
                    f"{golden['request']} gives {output}, not {golden['output']}"
                )


def write_bundle(
    folder: Path, model: nn.Module, objective: Objective, info: BundleInfo, dtype: torch.dtype = torch.float32
) -> Bundle:
    """Write a bundle in `dtype`, with its golden outputs, manifest and model card; the folder is renamed into place last."""
    model = model.to(dtype).eval()
    with atomic_folder(folder) as part:
        model.save_pretrained(part)  # type: ignore[operator]
        objective.save(part)
        outputs = objective.predict(model, info.golden_requests)
        packages = ("manta-train", "torch", "transformers", *objective.required_packages)
        manifest = Manifest(
            name=info.name,
            objective=asdict(objective.options),
            labels=objective.labels,
            sequence_length=objective.sequence_length,
            parent=info.parent,
            data=info.data,
            config_hash=info.config_hash,
            run=info.run,
            evaluation=info.evaluation,
            golden=[{"request": r, "output": o} for r, o in zip(info.golden_requests, outputs, strict=True)],
            files={},
            versions={package: _package_version(package) for package in packages},
            license=info.license,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            training=info.training,
        )
        card = CardContent(
            asdict(manifest),
            sum(p.numel() for p in model.parameters()),
            type(objective),
            info.intended_use,
            info.limits,
        )
        write_card(part, card)
        manifest = replace(manifest, files=_file_hashes(part))
        manifest = replace(manifest, hash=manifest.content_hash())
        (part / MANIFEST).write_text(json.dumps(manifest.to_dict(), indent=1) + "\n")
    return Bundle(folder, manifest)


def _file_hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            hashes[str(path.relative_to(folder))] = sha256_file(path)
    return hashes


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _numbers(output: Any) -> list[float]:
    """Return the floating-point numbers in an output, in order."""
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list):
        return [number for item in output for number in _numbers(item)]
    return [output] if isinstance(output, float) else []

"""The lineage of a bundle: its data, run, trial and parent bundles; its evaluations, registered versions and deployments.

Everything is read from the files that the jobs wrote, and checked against the hashes in the bundle's manifest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundles.bundle import Bundle, Manifest
from engine.bundles.model_card import read_evaluations
from engine.bundles.registry import Registry, Version
from engine.config import identity_hash
from engine.data.manifest import Manifest as DataManifest
from engine.data.remote_store import verify as verify_data
from engine.errors import UserError

DEPLOYMENT = "deployment.json"


@dataclass(frozen=True)
class PreparedData:
    """The prepared data of a training run."""

    folder: Path
    hash: str
    manifest: DataManifest | None  # None: missing or changed


@dataclass(frozen=True)
class Training:
    """The run that trained a bundle."""

    name: str
    job: str
    step: int
    folder: Path | None  # None: not found
    sweep: str | None  # name of the sweep, if the run was a trial
    num_trials: int = 0


@dataclass(frozen=True)
class Lineage:
    """A bundle, what it was made from and where it is used; `problems` are sentences on what is missing or was changed."""

    bundle: Bundle
    name: str
    data: PreparedData | None
    training: Training | None
    parent: Lineage | None
    problems: tuple[str, ...]
    evaluations: tuple[dict[str, Any], ...] = ()
    versions: tuple[Version, ...] = ()
    deployments: tuple[dict[str, Any], ...] = ()

    def all_problems(self) -> list[str]:
        """Return the problems of the bundle's ancestors and its own."""
        return [*(self.parent.all_problems() if self.parent else []), *self.problems]


def trace_lineage(bundle: Bundle, name: str, runs_dir: Path, registry: Registry) -> Lineage:
    """Trace a bundle back to its data. Reads all files of its ancestors and their data once, to check the hashes."""
    return _trace(bundle, name, runs_dir, registry, registry.versions(), is_ancestor=False)


def _trace(
    bundle: Bundle, name: str, runs_dir: Path, registry: Registry, versions: list[Version], is_ancestor: bool
) -> Lineage:
    problems: list[str] = []
    try:
        bundle.verify()
    except UserError as error:
        problems.append(str(error))
    manifest, parent = bundle.manifest, None
    if manifest is None:  # a plain Hugging Face folder records no origin
        return Lineage(bundle, name, None, None, None, tuple(problems))
    data = _trace_data(manifest.data, name, problems)
    training = _trace_training(manifest, name, runs_dir, problems)
    if manifest.parent:
        found = None
        try:
            found = _find_parent(manifest.parent, training, runs_dir, registry, versions)
        except UserError as error:
            problems.append(str(error))
        if found is None:
            problems.append(f"the bundle that {name} was trained from ({manifest.parent[:12]}) was not found")
        else:
            parent = _trace(found[0], found[1], runs_dir, registry, versions, is_ancestor=True)
    return Lineage(
        bundle, name, data, training, parent, tuple(problems),
        evaluations=() if is_ancestor else tuple(_evaluations(bundle, runs_dir)),
        versions=tuple(version for version in versions if version.hash == bundle.hash),
        deployments=() if is_ancestor else tuple(_deployments(bundle.hash, runs_dir)),
    )  # fmt: skip


def _trace_data(recorded: dict[str, str] | None, name: str, problems: list[str]) -> PreparedData | None:
    if recorded is None:
        problems.append(f"{name} does not say what data it was trained on")
        return None
    folder = Path(recorded["folder"])
    try:
        manifest = verify_data(folder)
    except UserError as error:
        problems.append(str(error))
        return PreparedData(folder, recorded["hash"], None)
    if manifest.hash != recorded["hash"]:
        problems.append(
            f"{folder} holds other data now ({manifest.hash[:12]}) than {name} was trained on ({recorded['hash'][:12]})"
        )
    return PreparedData(folder, recorded["hash"], manifest)


def _trace_training(manifest: Manifest, name: str, runs_dir: Path, problems: list[str]) -> Training | None:
    if not manifest.run:
        problems.append(f"{name} does not say which run trained it")
        return None
    run, training = manifest.run, manifest.training or {}
    config = training.get("config")
    if config is None:
        problems.append(f"{name} was written without the config of its run: train it again to promote it")
    elif identity_hash(config) != manifest.config_hash:
        problems.append(f"the config recorded in {name} does not match its recorded hash")
    folders = [runs_dir / run["name"], *sorted(runs_dir.glob(f"*/trials/{run['name']}"))]
    folder = next((folder for folder in folders if _has_step(folder, run)), None)
    if folder is None:
        problems.append(
            f"no run '{run['name']}' in {runs_dir} has logged step {run['step']} of {name} with the same samples"
        )
    sweep, num_trials = None, 0
    if folder and folder.parent.name == "trials":
        sweep = folder.parent.parent.name
        num_trials = sum(1 for path in folder.parent.iterdir() if path.is_dir())
    return Training(run["name"], training.get("job", "training"), run["step"], folder, sweep, num_trials)


def _has_step(folder: Path, run: dict[str, Any]) -> bool:
    """Tell whether a run has logged the bundle's step, with the same hash of the samples seen."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return False
    for text in file.read_text().splitlines():
        if text.endswith("}") and (line := json.loads(text))["step"] == run["step"]:
            return bool(line.get("samples_hash") == run["samples_hash"])
    return False


def _find_parent(
    digest: str, training: Training | None, runs_dir: Path, registry: Registry, versions: list[Version]
) -> tuple[Bundle, str] | None:
    """Find a bundle by its hash: in the folder that its child's run started from, among the runs, in the registry."""
    candidates = [(folder, folder.parent.name) for folder in sorted(runs_dir.glob("*/bundle"))]
    if training and training.folder:
        run_folder = training.folder.parent.parent if training.sweep else training.folder
        status = run_folder / "status.json"
        if status.is_file() and (parent := json.loads(status.read_text()).get("parent")):
            folder = Path(parent)
            candidates.insert(0, (folder, folder.parent.name if folder.name == "bundle" else folder.name))
    for folder, name in candidates:
        if (folder / "config.json").is_file() and (bundle := Bundle.open(folder)).hash == digest:
            return bundle, name
    for version in versions:
        if version.hash == digest:
            return registry.fetch(version), str(version)
    return None


def _evaluations(bundle: Bundle, runs_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a bundle's evaluations: those on its card first, then others with its hash in the run folders."""
    on_card = read_evaluations(bundle.folder)
    yield from on_card
    ids = {record.get("id") for record in on_card}
    for file in sorted(runs_dir.glob("*/evaluation.json")):
        for record in json.loads(file.read_text()).get("bundles", []):
            if record.get("hash") == bundle.hash and record.get("id") not in ids:
                yield record


def record_deployment(folder: Path, url: str, bundles: dict[str, Path]) -> None:
    """Record in a run's folder which bundles an endpoint serves, and since when."""
    hashes = {name: Bundle.open(bundle_folder).hash for name, bundle_folder in bundles.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEPLOYMENT).write_text(json.dumps({"url": url, "since": time.time(), "bundles": hashes}, indent=1) + "\n")


def _deployments(digest: str, runs_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield each endpoint that has served the bundle: url, name, since (Unix time, seconds), up (whether it still does)."""
    for file in sorted(runs_dir.glob(f"*/{DEPLOYMENT}")):
        deployment = json.loads(file.read_text())
        url = deployment["url"]
        for name, bundle_hash in deployment["bundles"].items():
            if bundle_hash == digest:
                yield {"url": url, "since": deployment["since"], "name": name, "up": _is_serving(url, digest)}


def _is_serving(url: str, digest: str) -> bool:
    import httpx

    try:
        models = httpx.get(f"{url}/v1/models", timeout=2).json()["data"]
        return any(model["hash"] == digest for model in models)
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False

"""Where a bundle came from and where it went: data, runs, trials, the bundles before, evaluations, versions, endpoints.

Everything is read from what the jobs left, and checked against the hashes in the bundle's manifest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundles.bundle import Bundle
from engine.bundles.card import read_evaluations
from engine.bundles.registry import Registry, Version
from engine.data.manifest import Manifest as DataManifest
from engine.data.manifest import verify as verify_data
from engine.errors import UserError

DEPLOYMENT = "deployment.json"


@dataclass(frozen=True)
class PreparedData:
    """The prepared data of a training."""

    folder: Path
    hash: str
    manifest: DataManifest | None


@dataclass(frozen=True)
class Training:
    """The run that made a bundle."""

    name: str
    job: str
    step: int
    folder: Path | None  # None: not found
    sweep: str | None  # name of the sweep whose trial it was
    trials: int = 0


@dataclass(frozen=True)
class Lineage:
    """A bundle with what was before it and after it; `faults` are what cannot be known or was changed, in sentences."""

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
        """Return the faults of this bundle and of those before it."""
        return [*(self.parent.all_problems() if self.parent else []), *self.problems]


def trace_lineage(bundle: Bundle, name: str, runs_dir: Path, registry: Registry) -> Lineage:
    """Trace a bundle. Reads every file that it stands on once, to check the hashes."""
    known = registry.versions()
    return _trace(bundle, name, runs_dir, registry, known, last=True)


def _trace(bundle: Bundle, name: str, runs_dir: Path, registry: Registry, known: list[Version], last: bool) -> Lineage:
    faults: list[str] = []
    try:
        bundle.verify()
    except UserError as error:
        faults.append(str(error))
    manifest, source, training, parent = bundle.manifest, None, None, None
    if manifest is None:  # a plain Hugging Face folder: where it came from is written elsewhere
        return Lineage(bundle, name, None, None, None, tuple(faults))
    source = _source(manifest.data, name, faults)
    training = _training(manifest, name, runs_dir, faults)
    if manifest.parent:
        found = None
        try:
            found = _find_parent(manifest.parent, training, runs_dir, registry, known)
        except UserError as error:
            faults.append(str(error))
        if found is None:
            faults.append(f"the bundle that {name} was trained from ({manifest.parent[:12]}) is not to be found")
        else:
            parent = _trace(found[0], found[1], runs_dir, registry, known, last=False)
    return Lineage(
        bundle, name, source, training, parent, tuple(faults),
        evaluations=tuple(_evaluations(bundle, runs_dir)) if last else (),
        versions=tuple(v for v in known if v.hash == bundle.hash),
        deployments=tuple(_deployments(bundle.hash, runs_dir)) if last else (),
    )  # fmt: skip


def _source(place: dict[str, str] | None, name: str, faults: list[str]) -> PreparedData | None:
    if place is None:
        faults.append(f"{name} does not say what data it was trained on")
        return None
    folder = Path(place["folder"])
    try:
        manifest = verify_data(folder)
    except UserError as error:
        faults.append(str(error))
        return PreparedData(folder, place["hash"], None)
    if manifest.hash != place["hash"]:
        faults.append(
            f"{folder} holds other data now ({manifest.hash[:12]}) than {name} was trained on ({place['hash'][:12]})"
        )
    return PreparedData(folder, place["hash"], manifest)


def _training(manifest: Any, name: str, runs_dir: Path, faults: list[str]) -> Training | None:
    if not manifest.run:
        faults.append(f"{name} does not say which run made it")
        return None
    run, told = manifest.run, manifest.training or {}
    config = told.get("config")
    if config is None:
        faults.append(f"{name} was written without the config of its run: train it again to promote it")
    elif hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest() != manifest.config_hash:
        faults.append(f"the config in {name} is not the one that its hash is of")
    folders = [runs_dir / run["name"], *sorted(runs_dir.glob(f"*/trials/{run['name']}"))]
    folder = next((one for one in folders if _took_the_step(one, run)), None)
    if folder is None:
        faults.append(f"no run '{run['name']}' in {runs_dir} has taken step {run['step']} of {name} on its samples")
    sweep, trials = None, 0
    if folder and folder.parent.name == "trials":
        sweep = folder.parent.parent.name
        trials = sum(1 for one in folder.parent.iterdir() if one.is_dir())
    return Training(run["name"], told.get("job", "training"), run["step"], folder, sweep, trials)


def _took_the_step(folder: Path, run: dict[str, Any]) -> bool:
    """Tell whether a run's metrics have the bundle's step with the same hash of the samples seen."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return False
    for line in file.read_text().splitlines():
        if line.endswith("}") and (found := json.loads(line))["step"] == run["step"]:
            return bool(found.get("samples_hash") == run["samples_hash"])
    return False


def _find_parent(
    digest: str, training: Training | None, runs_dir: Path, registry: Registry, known: list[Version]
) -> tuple[Bundle, str] | None:
    """Find a bundle by its hash: where its child's run found it, among the runs, in the registry."""
    places = [(folder, folder.parent.name) for folder in sorted(runs_dir.glob("*/bundle"))]
    if training and training.folder:
        home = training.folder.parent.parent if training.sweep else training.folder
        if (home / "status.json").is_file() and (
            parent := json.loads((home / "status.json").read_text()).get("parent")
        ):
            folder = Path(parent)
            places.insert(0, (folder, folder.parent.name if folder.name == "bundle" else folder.name))
    for folder, name in places:
        if (folder / "config.json").is_file() and (found := Bundle.open(folder)).hash == digest:
            return found, name
    for version in known:
        if version.hash == digest:
            return registry.fetch(version), str(version)
    return None


def _evaluations(bundle: Bundle, runs_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the evaluations of a bundle, those of its card first; the others are found by its hash."""
    told = read_evaluations(bundle.folder)
    yield from told
    ids = {found.get("id") for found in told}
    for file in sorted(runs_dir.glob("*/evaluation.json")):
        for found in json.loads(file.read_text()).get("bundles", []):
            if found.get("hash") == bundle.hash and found.get("id") not in ids:
                yield found


def record_deployment(folder: Path, url: str, bundles: dict[str, Path]) -> None:
    """Write down, in a run's folder, which bundles an endpoint took up, and when."""
    hashes = {name: Bundle.open(place).hash for name, place in bundles.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEPLOYMENT).write_text(json.dumps({"url": url, "since": time.time(), "bundles": hashes}, indent=1) + "\n")


def _deployments(digest: str, runs_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield each endpoint that took the bundle up: url, name, since (seconds since 1970), up (whether it serves it now)."""
    for file in sorted(runs_dir.glob(f"*/{DEPLOYMENT}")):
        told = json.loads(file.read_text())
        for name, found in told["bundles"].items():
            if found == digest:
                yield {"url": told["url"], "since": told["since"], "name": name, "up": _serves(told["url"], digest)}


def _serves(url: str, digest: str) -> bool:
    import httpx

    try:
        models = httpx.get(f"{url}/v1/models", timeout=2).json()["data"]
        return any(model["hash"] == digest for model in models)
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False

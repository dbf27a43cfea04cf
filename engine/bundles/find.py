"""Resolve a reference to a bundle (folder, run, registered name, version or alias) to its folder."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError, did_you_mean


def find_bundle(reference: str, runs_dir: Path, tracking_uri: str) -> Path:
    """Return the folder of a bundle, given as a folder, a run, or a registered name, version or alias.

    Raises UserError, which lists the known bundles, if there is none of that name; and if the manifest of a registered
    version is not the one that was registered.
    """
    folder = Path(reference)
    if (folder / "config.json").is_file():
        return folder
    if (runs_dir / reference / "bundle" / "config.json").is_file():
        return runs_dir / reference / "bundle"
    if folder.is_dir():
        raise UserError(
            f"{folder} holds no model (no config.json): give the folder of a bundle or of a Hugging Face model"
        )
    registered: list[str] = []
    database = tracking_uri.removeprefix("sqlite:///")
    if (
        database == tracking_uri or Path(database).exists()
    ):  # MLflow would create an empty database, which takes seconds
        from engine.bundles.registry import Registry

        registry = Registry(tracking_uri, runs_dir / "registry")
        if version := registry.lookup(reference):
            return registry.fetch(version).folder
        registered = [
            f"{version}" + "".join(f" ({alias})" for alias in version.aliases) for version in registry.versions()
        ]
    known = [path.parent.parent.name for path in sorted(runs_dir.glob("*/bundle/config.json"))] + registered
    known_names = f"there are {', '.join(known[:20])}" if known else f"there is none yet in {runs_dir}"
    raise UserError(
        f"bundle={reference} is neither a folder, nor a run, nor a registered name; {known_names}{did_you_mean(reference, known)}"
    )

"""From what a user calls a bundle to its folder."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError, nearest


def find_bundle(reference: str, runs_dir: Path, tracking_uri: str) -> Path:
    """Return the folder of a bundle: a folder itself, a run's, or a registered name, version or alias.

    Raises UserError, which lists what there is, where nothing is called so; and where a registered version's manifest is
    not the one that was registered.
    """
    folder = Path(reference)
    if (folder / "config.json").is_file():
        return folder
    if (runs_dir / reference / "bundle" / "config.json").is_file():
        return runs_dir / reference / "bundle"
    if folder.is_dir():
        raise UserError(f"{folder} holds no model (no config.json): give a bundle's or a Hugging Face model's folder")
    registered: list[str] = []
    database = tracking_uri.removeprefix("sqlite:///")
    if database == tracking_uri or Path(database).exists():  # MLflow would make an empty database, in seconds
        from engine.bundles.registry import Registry

        registry = Registry(tracking_uri, runs_dir / "registry")
        if found := registry.lookup(reference):
            return registry.fetch(found).folder
        registered = [f"{v}" + "".join(f" ({alias})" for alias in v.aliases) for v in registry.versions()]
    known = [path.parent.parent.name for path in sorted(runs_dir.glob("*/bundle/config.json"))] + registered
    there = f"there are {', '.join(known[:20])}" if known else f"there is none yet in {runs_dir}"
    raise UserError(
        f"bundle={reference} is neither a folder, nor a run, nor a registered name; {there}{nearest(reference, known)}"
    )

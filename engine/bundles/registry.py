"""Versions and aliases of bundles, in MLflow's model registry: this project keeps no registry of its own."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bundles.bundle import Bundle
from engine.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Version:
    """One registered version of a bundle."""

    name: str
    number: int
    folder: Path
    hash: str
    aliases: tuple[str, ...]


def client(tracking_uri: str) -> MlflowClient:
    """Return a quiet MLflow client. Importing MLflow takes one to three seconds."""
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri)


def register(bundle: Bundle, name: str, tracking_uri: str) -> Version:
    """Register a bundle under `name`; one that is registered already keeps its version. Raises UserError if it was changed."""
    bundle.verify()
    known, mlflow = versions(name, tracking_uri), client(tracking_uri)
    for found in known:
        if found.hash == bundle.hash:  # the same bundle, perhaps at another place now
            mlflow.set_model_version_tag(name, str(found.number), "manta.folder", str(bundle.folder.absolute()))
            return replace(found, folder=bundle.folder.absolute())
    if not known and not mlflow.search_registered_models(f"name = '{name}'"):
        mlflow.create_registered_model(name)
    tags = {"manta.hash": bundle.hash, "manta.folder": str(bundle.folder.absolute())}
    made = mlflow.create_model_version(name, source=bundle.folder.absolute().as_uri(), tags=tags)
    return Version(name, int(made.version), bundle.folder.absolute(), bundle.hash, ())


def promote(version: Version, alias: str, tracking_uri: str) -> None:
    """Point `alias` of the version's name at it."""
    client(tracking_uri).set_registered_model_alias(version.name, alias, str(version.number))


def versions(name: str | None, tracking_uri: str) -> list[Version]:
    """Return the versions of one name, or of all, newest first."""
    mlflow = client(tracking_uri)
    aliases: dict[tuple[str, int], list[str]] = defaultdict(list)
    for model in mlflow.search_registered_models():
        for alias, number in model.aliases.items():
            aliases[model.name, int(number)].append(alias)
    return [
        Version(
            found.name, int(found.version), Path(found.tags["manta.folder"]), found.tags["manta.hash"],
            tuple(sorted(aliases[found.name, int(found.version)])),
        )
        for found in mlflow.search_model_versions(f"name = '{name}'" if name else "", order_by=["last_updated_timestamp DESC"])
        if "manta.folder" in found.tags
    ]  # fmt: skip


def lookup(reference: str, tracking_uri: str) -> Version | None:
    """Find `name`, `name/3`, `name@alias` or a bare alias; None where nothing is called so."""
    name, _, alias = reference.partition("@")
    name, _, number = name.partition("/")
    if number and not number.isdigit():
        raise UserError(f"bundle={reference} is no version: use {name}/NUMBER, {name}@ALIAS or a folder that is there")
    everything = versions(None, tracking_uri)
    named = [v for v in everything if v.name == name]
    if alias:
        return next((v for v in named if alias in v.aliases), None)
    if number:
        return next((v for v in named if v.number == int(number)), None)
    return max(named, key=lambda v: v.number, default=None) or next((v for v in everything if name in v.aliases), None)

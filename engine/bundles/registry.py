"""Versions and aliases of bundles, in MLflow's model registry: this project keeps no registry of its own.

A version's bytes are artifacts of an MLflow run of its own, so no later training overwrites them: with a server they lie
where the server keeps artifacts, else in <runs_dir>/registry.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from engine.bundles.bundle import Bundle
from engine.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "manta-registry"  # MLflow experiment of the runs that hold the versions' bytes
INSIDE = "bundle"  # the bundle's folder among such a run's artifacts


@dataclass(frozen=True)
class Version:
    """One registered version of a bundle."""

    name: str
    number: int
    folder: Path  # where its bytes are, or are put when they are first asked for
    hash: str
    source: str  # URI of the bytes
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"


class Registry:
    """MLflow's registry, at one tracking URI."""

    def __init__(self, uri: str, folder: Path) -> None:
        """Take MLflow's URI, and the folder where bundles are kept: all of them, or copies of a server's."""
        self.uri, self.folder = uri, folder.absolute()
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """A quiet MLflow client. Importing MLflow takes one to three seconds."""
        if self._client is None:
            from mlflow import MlflowClient

            for name in ("alembic", "mlflow"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = MlflowClient(self.uri)
        return self._client

    def register(self, bundle: Bundle, name: str) -> Version:
        """Keep a bundle as a version of `name`; one that is registered already keeps its version.

        Raises UserError if the bundle was changed, or has no manifest to know it again by.
        """
        if not bundle.has_manifest:
            raise UserError(f"{bundle.folder} is no bundle of Manta's (no manta.json): fine-tune it first")
        bundle.verify()
        known = self.versions(name)
        for found in known:
            if found.hash == bundle.hash:
                return found
        self.create_name(name)
        run = self.client.create_run(self._experiment(), run_name=f"{name} {bundle.hash[:12]}")
        self.client.log_artifacts(run.info.run_id, str(bundle.folder), INSIDE)
        self.client.set_terminated(run.info.run_id)
        source = f"{run.info.artifact_uri}/{INSIDE}"
        made = retry_on_conflict(
            lambda: self.client.create_model_version(
                name, source=source, run_id=run.info.run_id, tags={"manta.hash": bundle.hash}
            )
        )
        return Version(name, int(made.version), self._place(source, bundle.hash), bundle.hash, source)

    def create_name(self, name: str, tags: dict[str, str] | None = None) -> None:
        """Make a registered model unless there is one of that name."""
        from mlflow.exceptions import MlflowException

        try:
            retry_on_conflict(lambda: self.client.create_registered_model(name, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def fetch(self, version: Version) -> Bundle:
        """Return a version's bundle, brought here from the server first if need be.

        Raises UserError where its bytes are gone, or aren't those that were registered.
        """
        if not version.source.startswith("file:") and not version.folder.exists():
            import mlflow.artifacts

            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as part:
                got = mlflow.artifacts.download_artifacts(version.source, dst_path=part, tracking_uri=self.uri)
                with contextlib.suppress(OSError):  # another process was first
                    Path(got).rename(version.folder)
        if not (version.folder / "config.json").is_file():
            raise UserError(
                f"{version} is registered in {version.folder}, which is gone: restore it, or register another"
            )
        bundle = Bundle.open(version.folder)
        if not bundle.has_manifest or bundle.hash != version.hash:
            raise UserError(f"{version.folder / 'manta.json'} is not the one that was registered as {version}: refused")
        return bundle

    def versions(self, name: str | None = None) -> list[Version]:
        """Return the versions of one name, or of all, newest first."""
        aliases: dict[tuple[str, int], list[str]] = defaultdict(list)
        for model in all_pages(lambda token: self.client.search_registered_models(page_token=token)):
            for alias, number in model.aliases.items():
                aliases[model.name, int(number)].append(alias)
        chosen, order = f"name = '{name}'" if name else "", ["last_updated_timestamp DESC"]
        found = all_pages(lambda token: self.client.search_model_versions(chosen, order_by=order, page_token=token))
        return [
            Version(
                one.name, int(one.version), self._place(one.source, one.tags["manta.hash"]), one.tags["manta.hash"],
                one.source, tuple(sorted(aliases[one.name, int(one.version)])),
            )
            for one in found
            if "manta.hash" in one.tags
        ]  # fmt: skip

    def lookup(self, reference: str) -> Version | None:
        """Find `name`, `name/3`, `name@alias` or a bare alias; None where nothing is called so.

        Raises UserError for a number that is none, and for an alias that several names have.
        """
        name, _, alias = reference.partition("@")
        name, _, number = name.partition("/")
        if number and not number.isdigit():
            raise UserError(
                f"bundle={reference} is no version: use {name}/NUMBER, {name}@ALIAS or a folder that is there"
            )
        everything = self.versions()
        named = [v for v in everything if v.name == name]
        if alias:
            return next((v for v in named if alias in v.aliases), None)
        if number:
            return next((v for v in named if v.number == int(number)), None)
        if named:
            return max(named, key=lambda v: v.number)
        called = [v for v in everything if name in v.aliases]
        if len(called) > 1:
            raise UserError(
                f"{name} is an alias of several: say which with {' or '.join(sorted(f'{v.name}@{name}' for v in called)[:5])}"
            )
        return called[0] if called else None

    def _place(self, source: str, digest: str) -> Path:
        url = urlparse(source)
        return Path(unquote(url.path)) if url.scheme == "file" else self.folder / digest

    def _experiment(self) -> str:
        """Return the id of the experiment that holds the bytes; without a server they lie in the registry's folder."""
        if known := self.client.get_experiment_by_name(EXPERIMENT):
            found: str = known.experiment_id
            return found
        place = None if self.uri.startswith(("http:", "https:")) else self.folder.as_uri()
        made: str = self.client.create_experiment(EXPERIMENT, artifact_location=place)
        return made


def all_pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield what a search of MLflow finds, page after page."""
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def retry_on_conflict(write: Callable[[], Any], tries: int = 20) -> Any:
    """Write to MLflow, again where another process has locked the database or took the same version number."""
    from mlflow.exceptions import MlflowException

    for left in reversed(range(tries)):
        try:
            return write()
        except MlflowException as error:
            if not left or not any(word in str(error) for word in ("locked", "Giving up", "UNIQUE")):
                raise
            time.sleep(0.05)
    raise AssertionError

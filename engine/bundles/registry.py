"""Versions and aliases of bundles in MLflow's model registry.

The files of a version are artifacts of an MLflow run of its own, so that no later training overwrites them: in the
artifact store of the MLflow server, or without a server in <runs_dir>/registry.
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

EXPERIMENT = "manta-registry"  # MLflow experiment of the runs that hold the versions' files
ARTIFACT_PATH = "bundle"  # of the bundle's folder among the artifacts of such a run


@dataclass(frozen=True)
class Version:
    """One registered version of a bundle."""

    name: str
    number: int
    folder: Path  # where its files are, or where they are downloaded to on first use
    hash: str
    source: str  # URI of the files
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"


class Registry:
    """MLflow's model registry at one tracking URI."""

    def __init__(self, uri: str, folder: Path) -> None:
        """Use MLflow at `uri`; `folder` holds the files of all versions, or with a server local copies of them."""
        self.uri, self.folder = uri, folder.absolute()
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """An MLflow client with logging reduced to warnings. Importing MLflow takes one to three seconds."""
        if self._client is None:
            from mlflow import MlflowClient

            for name in ("alembic", "mlflow"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self._client = MlflowClient(self.uri)
        return self._client

    def register(self, bundle: Bundle, name: str) -> Version:
        """Register a bundle as a new version of `name`, or return the version that it has already.

        Raises UserError if the bundle was changed, or has no manifest to verify it with.
        """
        if not bundle.has_manifest:
            raise UserError(f"{bundle.folder} is not a bundle of Manta's (no manta.json): fine-tune it first")
        bundle.verify()
        for version in self.versions(name):
            if version.hash == bundle.hash:
                return version
        self.create_name(name)
        run = self.client.create_run(self._experiment(), run_name=f"{name} {bundle.hash[:12]}")
        self.client.log_artifacts(run.info.run_id, str(bundle.folder), ARTIFACT_PATH)
        self.client.set_terminated(run.info.run_id)
        source = f"{run.info.artifact_uri}/{ARTIFACT_PATH}"
        created = retry_on_conflict(
            lambda: self.client.create_model_version(
                name, source=source, run_id=run.info.run_id, tags={"manta.hash": bundle.hash}
            )
        )
        return Version(name, int(created.version), self._local_folder(source, bundle.hash), bundle.hash, source)

    def create_name(self, name: str, tags: dict[str, str] | None = None) -> None:
        """Create a registered model unless there is one of that name."""
        from mlflow.exceptions import MlflowException

        try:
            retry_on_conflict(lambda: self.client.create_registered_model(name, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def fetch(self, version: Version) -> Bundle:
        """Return the bundle of a version, downloaded from the server if necessary.

        Raises UserError if its files are gone, or are not those that were registered.
        """
        if not version.source.startswith("file:") and not version.folder.exists():
            import mlflow.artifacts

            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as part:
                downloaded = mlflow.artifacts.download_artifacts(version.source, dst_path=part, tracking_uri=self.uri)
                with contextlib.suppress(OSError):  # another process was first
                    Path(downloaded).rename(version.folder)
        if not (version.folder / "config.json").is_file():
            raise UserError(
                f"{version} is registered in {version.folder}, which is gone: restore it, or register another version"
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
        query, order = f"name = '{name}'" if name else "", ["last_updated_timestamp DESC"]
        versions = all_pages(lambda token: self.client.search_model_versions(query, order_by=order, page_token=token))
        return [
            Version(
                version.name, int(version.version), self._local_folder(version.source, version.tags["manta.hash"]),
                version.tags["manta.hash"], version.source, tuple(sorted(aliases[version.name, int(version.version)])),
            )
            for version in versions
            if "manta.hash" in version.tags
        ]  # fmt: skip

    def lookup(self, reference: str) -> Version | None:
        """Find `name` (its newest version), `name/3`, `name@alias` or a bare alias; None if there is none.

        Raises UserError for an invalid version number, and for a bare alias that several names have.
        """
        name, _, alias = reference.partition("@")
        name, _, number = name.partition("/")
        if number and not number.isdigit():
            raise UserError(
                f"bundle={reference} is not a version: use {name}/NUMBER, {name}@ALIAS or an existing folder"
            )
        versions = self.versions()
        named = [version for version in versions if version.name == name]
        if alias:
            return next((version for version in named if alias in version.aliases), None)
        if number:
            return next((version for version in named if version.number == int(number)), None)
        if named:
            return max(named, key=lambda version: version.number)
        aliased = [version for version in versions if name in version.aliases]
        if len(aliased) > 1:
            choices = sorted(f"{version.name}@{name}" for version in aliased)
            raise UserError(f"{name} is an alias of several names: use {' or '.join(choices[:5])}")
        return aliased[0] if aliased else None

    def _local_folder(self, source: str, digest: str) -> Path:
        url = urlparse(source)
        return Path(unquote(url.path)) if url.scheme == "file" else self.folder / digest

    def _experiment(self) -> str:
        """Return the id of the experiment that holds the files; without a server they lie in the registry's folder."""
        if experiment := self.client.get_experiment_by_name(EXPERIMENT):
            experiment_id: str = experiment.experiment_id
            return experiment_id
        location = None if self.uri.startswith(("http:", "https:")) else self.folder.as_uri()
        created_id: str = self.client.create_experiment(EXPERIMENT, artifact_location=location)
        return created_id


def all_pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield the results of an MLflow search, page after page."""
    token = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def retry_on_conflict(write: Callable[[], Any], tries: int = 20) -> Any:
    """Write to MLflow; retry if another process has locked the database or took the same version number."""
    from mlflow.exceptions import MlflowException

    for tries_left in reversed(range(tries)):
        try:
            return write()
        except MlflowException as error:
            if not tries_left or not any(word in str(error) for word in ("locked", "Giving up", "UNIQUE")):
                raise
            time.sleep(0.05)
    raise AssertionError

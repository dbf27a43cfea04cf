"""Make a bundle the champion if it is whole and better, and go back to the one before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.lineage import trace_lineage
from engine.bundles.promotion import Alias
from engine.bundles.registry import Registry, Version
from engine.config import Config, with_values
from engine.errors import UserError
from engine.evaluate.bootstrap import Comparison
from engine.evaluate.evaluate import (
    check_comparable,
    check_same_data,
    compare_evaluations,
    evaluate_bundle,
    describe_comparison,
    with_training_data,
)
from engine.progress import console


@dataclass(frozen=True)
class Decision:
    """Whether a candidate becomes the champion, and why: the reason is kept with the promotion."""

    promote: bool
    reason: str


def decide_promotion(compared: Comparison | None, names: tuple[str, str], override: str | None) -> Decision:
    """Decide by the comparison with the champion (None: there is none yet) and by the override's reason."""
    if compared is None:
        return Decision(True, override or "the first champion of this name")
    told = describe_comparison(compared, names)
    if compared.verdict == "better":
        return Decision(True, told)
    if override:
        return Decision(True, f"{override} ({told})")
    return Decision(False, f"{told}: promote.reason='...' promotes it all the same, with the reason kept")


def promote(config: Config, data_given: bool) -> Version:
    """Move the alias tracking.alias to config.bundle, once it has verified, replayed, shown its lineage and won.

    It is compared with the present champion on the candidate's own data, or on config.data if they were `data_given`.
    Raises UserError, and moves nothing, for the first of these that it fails; and where another promotion came first.
    """
    assert config.bundle
    runs_dir, registry = Path(config.runs_dir), Registry(config.tracking_uri, config.registry_dir)
    folder = find_bundle(config.bundle, runs_dir, config.tracking_uri)
    name = config.promote.model or registered_name(config.bundle, folder, registry)
    candidate = Bundle.open(folder)
    candidate.verify()
    candidate.replay(candidate.model())
    console.print("verified  the hashes of all files; the golden outputs are as recorded")
    faults = trace_lineage(candidate, config.bundle, runs_dir, registry).all_problems()
    if faults:
        raise UserError(f"the lineage of {config.bundle} is not whole: {'; '.join(faults)}")
    console.print("traced    data, runs and the bundles before it, each by its hash")

    alias = Alias(registry, name, config.tracking.alias)
    start = alias.current()
    champion = registry.lookup(f"{name}/{start}") if start else None
    if champion and champion.hash == candidate.hash:
        console.print(f"{champion} is the {config.tracking.alias} already")
        return champion
    compared = None
    if champion:
        compared = compare_with_champion(candidate, registry.fetch(champion), (config.bundle, str(champion)), config, data_given)
    decision = decide_promotion(compared, (config.bundle, str(champion)), config.promote.reason)
    if not decision.promote:
        raise UserError(decision.reason)
    version = registry.register(candidate, name)
    registry.fetch(version).verify()  # the bytes that are kept, and not only those that were given
    alias.move("promote", start, version.number, decision.reason)
    console.print(f"promoted  {version} is the {config.tracking.alias}: {decision.reason}")
    return version


def compare_with_champion(
    candidate: Bundle, champion: Bundle, names: tuple[str, str], config: Config, data_given: bool
) -> Comparison:
    """Compare the two on the same examples. Raises UserError where they can't be."""
    check_comparable(candidate, champion)
    if not data_given:
        check_same_data(candidate, champion, names)
        config = with_training_data(config, candidate, names[0])
    config = with_values(config, {"evaluate.images": 0})  # the verdict is of the examples' scores
    first, second = (evaluate_bundle(bundle.folder, config) for bundle in (candidate, champion))
    return compare_evaluations(first, second, config)


def registered_name(reference: str, folder: Path, registry: Registry) -> str:
    """Return the registered name of a version, else the run's, else what the bundle is called."""
    if registry.folder in folder.absolute().parents and (version := registry.lookup(reference)):
        return version.name
    manifest = Bundle.open(folder).manifest
    return folder.parent.name if folder.name == "bundle" or manifest is None else manifest.name


def roll_back(config: Config) -> None:
    """Restore the champion before the present one of the name config.bundle."""
    assert config.bundle
    registry = Registry(config.tracking_uri, config.registry_dir)
    name = config.promote.model or config.bundle.split("@")[0].split("/")[0]
    if not registry.versions(name):
        raise UserError(f"{name} is no registered name: manta promote {name} registers it")
    alias = Alias(registry, name, config.tracking.alias)
    start, to = alias.roll_back(config.promote.reason or "rolled back")
    console.print(f"rolled back: {name}/{to} is the {config.tracking.alias} again, and {name}/{start} is not")


def is_champion(config: Config, digest: str) -> bool:
    """Tell whether the name config.bundle is registered, and its champion is the bundle with this hash."""
    database = config.tracking_uri.removeprefix("sqlite:///")
    if database != config.tracking_uri and not Path(database).exists():  # MLflow would make an empty one
        return False
    assert config.bundle
    found = Registry(config.tracking_uri, config.registry_dir).lookup(f"{config.bundle}@{config.tracking.alias}")
    return found is not None and found.hash == digest

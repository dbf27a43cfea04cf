"""Promote a bundle to champion if it verifies and is better, and roll back to the previous champion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.bundles.alias import Alias
from engine.bundles.bundle import Bundle
from engine.bundles.find import find_bundle
from engine.bundles.lineage import trace_lineage
from engine.bundles.registry import Registry, Version
from engine.config import Config, with_values
from engine.errors import UserError
from engine.evaluate.bootstrap import BETTER, Comparison
from engine.evaluate.comparison import (
    check_comparable,
    check_same_data,
    compare_evaluations,
    describe_comparison,
    with_training_data,
)
from engine.evaluate.evaluate import evaluate_bundle
from engine.progress import console


@dataclass(frozen=True)
class Decision:
    """Whether a candidate becomes the champion; the reason is recorded with the promotion."""

    promote: bool
    reason: str


def decide_promotion(comparison: Comparison | None, names: tuple[str, str], override: str | None) -> Decision:
    """Decide by the comparison with the champion (None: there is none yet); an override's reason stands in for it."""
    if comparison is None:
        return Decision(True, override or "the first champion of this name")
    result = describe_comparison(comparison, names)
    if comparison.verdict == BETTER:
        return Decision(True, result)
    if override:
        return Decision(True, f"{override} ({result})")
    return Decision(False, f"{result}: promote.reason='...' promotes it anyway, and records the reason")


def promote(config: Config, data_given: bool) -> Version:
    """Move the alias tracking.alias to config.bundle.

    It must verify, reproduce its golden outputs, have a complete lineage, and be better than the current champion on its
    own training data's held-out split, or on config.data if `data_given`. Raises UserError, and moves nothing, for the first
    check that fails, and if another promotion came first.
    """
    assert config.bundle
    runs_dir, registry = Path(config.runs_dir), Registry(config.tracking_uri, config.registry_dir)
    folder = find_bundle(config.bundle, runs_dir, config.tracking_uri)
    name = config.promote.model or registered_name(config.bundle, folder, registry)
    candidate = Bundle.open(folder)
    candidate.verify()
    candidate.replay(candidate.model())
    console.print("verified  all hashes match; the golden outputs are reproduced")
    problems = trace_lineage(candidate, config.bundle, runs_dir, registry).all_problems()
    if problems:
        raise UserError(f"the lineage of {config.bundle} is incomplete: {'; '.join(problems)}")
    console.print("traced    data, runs and parent bundles, each by its hash")

    alias = Alias(registry, name, config.tracking.alias)
    current = alias.current()
    champion = registry.lookup(f"{name}/{current}") if current else None
    if champion and champion.hash == candidate.hash:
        console.print(f"{champion} is already the {config.tracking.alias}")
        return champion
    comparison = None
    if champion:
        comparison = compare_with_champion(
            candidate, registry.fetch(champion), (config.bundle, str(champion)), config, data_given
        )
    decision = decide_promotion(comparison, (config.bundle, str(champion)), config.promote.reason)
    if not decision.promote:
        raise UserError(decision.reason)
    version = registry.register(candidate, name)
    registry.fetch(version).verify()  # the registered copy, not only the original
    alias.move("promote", current, version.number, decision.reason)
    console.print(f"promoted  {version} is the {config.tracking.alias}: {decision.reason}")
    return version


def compare_with_champion(
    candidate: Bundle, champion: Bundle, names: tuple[str, str], config: Config, data_given: bool
) -> Comparison:
    """Compare the two on the same examples. Raises UserError if they are not comparable."""
    check_comparable(candidate, champion)
    if not data_given:
        check_same_data(candidate, champion, names)
        config = with_training_data(config, candidate, names[0])
    config = with_values(config, {"evaluate.images": 0})  # the comparison uses the scores of the examples only
    first, second = (evaluate_bundle(bundle.folder, config) for bundle in (candidate, champion))
    return compare_evaluations(first, second, config)


def registered_name(reference: str, folder: Path, registry: Registry) -> str:
    """Return the registered name of a version, else the run's name, else the name in the manifest."""
    if registry.folder in folder.absolute().parents and (version := registry.lookup(reference)):
        return version.name
    manifest = Bundle.open(folder).manifest
    return folder.parent.name if folder.name == "bundle" or manifest is None else manifest.name


def roll_back(config: Config) -> None:
    """Restore the previous champion of the registered name config.bundle."""
    assert config.bundle
    registry = Registry(config.tracking_uri, config.registry_dir)
    name = config.promote.model or config.bundle.split("@")[0].split("/")[0]
    if not registry.versions(name):
        raise UserError(f"{name} is not a registered name: manta promote {name} registers it")
    alias = Alias(registry, name, config.tracking.alias)
    from_version, to_version = alias.roll_back(config.promote.reason or "rolled back")
    console.print(
        f"rolled back: {name}/{to_version} is the {config.tracking.alias} again, instead of {name}/{from_version}"
    )


def is_champion(config: Config, digest: str) -> bool:
    """Tell whether config.bundle is a registered name whose champion is the bundle with this hash."""
    database = config.tracking_uri.removeprefix("sqlite:///")
    if database != config.tracking_uri and not Path(database).exists():  # MLflow would create an empty one
        return False
    assert config.bundle
    champion = Registry(config.tracking_uri, config.registry_dir).lookup(f"{config.bundle}@{config.tracking.alias}")
    return champion is not None and champion.hash == digest

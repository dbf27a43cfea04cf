"""Compare two bundles on the same examples, and check beforehand that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.data.manifest import Manifest
from engine.errors import UserError
from engine.evaluate.bootstrap import INCONCLUSIVE, Comparison, compare_paired
from engine.evaluate.evaluate import Evaluation


def compare_evaluations(a: Evaluation, b: Evaluation, config: Config) -> Comparison:
    """Compare two evaluated bundles. Raises UserError if their metrics are not comparable."""
    first, second = a.objective, b.objective
    check_comparable(a.bundle, b.bundle)
    same_tokens = (a.data, first.sequence_length) == (b.data, second.sequence_length)
    if first.metric == "loss" and first.has_lm_head and not same_tokens:
        raise UserError(
            f"{a.bundle.folder} and {b.bundle.folder} differ in tokenizer or sequence length, so their losses per token are "
            "not comparable: evaluate each alone"
        )
    options = config.evaluate
    return compare_paired(first, a.scores, b.scores, options.confidence, options.resamples, config.seed)


def check_comparable(a: Bundle, b: Bundle) -> None:
    """Raise UserError, before anything is evaluated, for bundles of different objectives or with different labels."""
    first, second = a.objective(), b.objective()
    if first.options.name != second.options.name:
        raise UserError(
            f"{a.folder} is for {first.options.name} and {b.folder} for {second.options.name}: "
            "compare bundles of the same objective"
        )
    if set(first.labels) != set(second.labels):
        different = sorted(set(first.labels) ^ set(second.labels))
        raise UserError(
            f"{a.folder} and {b.folder} have different labels ({', '.join(different[:5])} in one of them only): "
            "compare bundles that were trained on the same data"
        )


def with_training_data(config: Config, bundle: Bundle, name: str) -> Config:
    """Return the config with the data that a bundle was trained on. Raises UserError if they are unknown or gone."""
    manifest = _training_data(bundle, name)
    values = {f"data.{key}": value for key, value in manifest.config.items()}
    return with_values(config, values | {"seed": manifest.seed, "objective.name": bundle.objective().options.name})


def check_same_data(a: Bundle, b: Bundle, names: Sequence[str]) -> None:
    """Raise UserError for bundles trained on different data, as one may have been trained on the test split of the other."""
    first, second = (_training_data(bundle, name) for bundle, name in zip((a, b), names, strict=True))
    same_split = first.sources.get("sha256") == second.sources.get("sha256") and first.seed == second.seed
    if first.hash != second.hash and not same_split:
        raise UserError(
            f"{names[0]} was trained on {first.name} ({first.hash[:8]}) and {names[1]} on {second.name} ({second.hash[:8]}): "
            "say which data to compare them on with data=... or data.path=..."
        )


def describe_comparison(comparison: Comparison, names: Sequence[str]) -> str:
    """State the result of a comparison in a sentence."""
    if comparison.verdict == INCONCLUSIVE:
        result = f"there is no significant difference between {names[0]} and {names[1]}"
    else:
        result = f"{names[0]} is {comparison.verdict} than {names[1]}"
    return (
        f"{result}: {comparison.metric} differs by {comparison.difference:+.4f} "
        f"({comparison.low:+.4f} to {comparison.high:+.4f}, paired bootstrap)"
    )


def _training_data(bundle: Bundle, name: str) -> Manifest:
    recorded = bundle.manifest and bundle.manifest.data
    if not recorded:
        raise UserError(
            f"{name} does not say what data it was trained on: say which to use with data=... or data.path=..."
        )
    return Manifest.load(recorded["folder"])

"""The search space of a config: checked against the schema before anything starts, then Ray Tune's domains."""

from __future__ import annotations

from typing import Any

from engine.config import Config, with_values
from engine.errors import UserError, nearest

KINDS = {
    "choice": None,
    "grid": None,
    "uniform": 2,
    "loguniform": 2,
    "randint": 2,
}  # kind -> values it takes (None: any number)


def check_space(config: Config) -> dict[str, tuple[str, list[Any]]]:
    """Return {key: (kind, values)} of sweep.space. Raises UserError for a key, kind or value that no trial could take."""
    if not config.sweep.space:
        raise UserError("sweep.space is empty: give it keys, such as sweep.space={optim.lr:{loguniform:[1e-5,1e-3]}}")
    checked = {}
    for key, domain in flatten(config.sweep.space).items():
        if not (isinstance(domain, dict) and len(domain) == 1):
            raise UserError(
                f"sweep.space.{key}: {domain} is no domain: use {{KIND: [...]}} with one of {', '.join(KINDS)}"
            )
        kind, values = next(iter(domain.items()))
        if kind not in KINDS:
            raise UserError(f"sweep.space.{key}: {kind} is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
        if not isinstance(values, list) or not values or len(values) != (KINDS[kind] or len(values)):
            raise UserError(
                f"sweep.space.{key}: {kind} takes {'a list' if KINDS[kind] is None else '[low, high]'}, not {values}"
            )
        if KINDS[kind] and not (values[0] < values[1] and (kind != "loguniform" or values[0] > 0)):
            raise UserError(
                f"sweep.space.{key}: {kind} {values} is no range: use [low, high], low first, above 0 for loguniform"
            )
        for value in values:
            with_values(config, {key: value})
        checked[key] = (kind, values)
    return checked


def flatten(space: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the space with dotted keys, also where it was given as nested groups (`sweep.space.optim.lr=...`)."""
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, dict) and not set(value) & set(KINDS) and all(isinstance(v, dict) for v in value.values()):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def tune_space(checked: dict[str, tuple[str, list[Any]]]) -> dict[str, Any]:
    """Turn a checked space into Ray Tune's domains."""
    from ray import tune

    makers = {
        "choice": tune.choice,
        "grid": tune.grid_search,
        "uniform": lambda values: tune.uniform(*values),
        "loguniform": lambda values: tune.loguniform(*values),
        "randint": lambda values: tune.randint(*values),
    }
    return {key: makers[kind](values) for key, (kind, values) in checked.items()}

"""The search space of a sweep: parsed and checked against the config schema, and random or grid sampling of params.

Random samples are a pure function of the space, the seed and the trial's index, so that a resumed sweep samples the same
params again.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.config import SEARCHERS, Config, declared, declared_in, get, is_of, type_name, with_values
from engine.errors import UserError, did_you_mean

# kind of a domain -> number of values that it takes (None: any)
KINDS = {"choice": None, "grid": None, "uniform": 2, "loguniform": 2, "randint": 2}
LISTED_KINDS = ("choice", "grid")
# Groups and keys that belong to the sweep as a whole, so that they are the same for all trials.
FIXED_OPTIONS = (
    "job", "name", "runs_dir", "resume", "profile", "bundle", "sweep", "evaluate", "card", "promote", "plan", "convert",
    "serve", "cluster", "tracking", "demo", "train.max_steps", "train.workers", "train.min_workers",
    "train.gpus_per_worker", "train.cpus_per_worker",
)  # fmt: skip
# Options that PBT may change while a model trains; model shape, data and kind of optimizer must stay.
MUTABLE_OPTIONS = (
    "optim.lr", "optim.weight_decay", "optim.beta1", "optim.beta2", "optim.eps", "optim.momentum", "optim.clip", "schedule",
    "train.global_batch", "train.global_batch_tokens", "train.micro_batch", "model.dropout", "objective.mask_rate",
    "objective.noise_density", "objective.mean_span", "objective.z_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """The domain of one key of the config."""

    kind: str
    values: tuple[Any, ...]  # all of them, or (low, high)
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # other key -> values with which this key is active

    @property
    def is_listed(self) -> bool:
        """Whether the values are listed one by one."""
        return self.kind in LISTED_KINDS

    def is_active(self, params: dict[str, Any], config: Config) -> bool:
        """Return whether the key is active, given the params so far and the config."""
        return all((params[key] if key in params else get(config, key)) in values for key, values in self.when.items())

    def value_at(self, position: float) -> Any:
        """Return the value at a position in [0, 1)."""
        if self.is_listed:
            return self.values[int(position * len(self.values))]
        low, high = self.values
        if self.kind == "randint":
            return int(low + math.floor(position * (high - low)))
        if self.kind == "loguniform":
            return float(min(high, max(low, math.exp(math.log(low) + position * (math.log(high) - math.log(low))))))
        return float(low + position * (high - low))

    def to_unit(self, value: Any) -> float:
        """Return the position of a value in [0, 1]: the inverse of `value_at`, up to rounding."""
        if self.is_listed:
            return (self.values.index(value) + 0.5) / len(self.values)
        low, high = self.values
        if self.kind == "loguniform":
            return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return (value - low + (0.5 if self.kind == "randint" else 0.0)) / (high - low)


SearchSpace = dict[str, Domain]  # each key comes after the keys in its condition


def parse_search_space(config: Config) -> SearchSpace:
    """Return the domains of sweep.space. Raises UserError for an invalid key, kind, value or condition."""
    if not config.sweep.space:
        raise UserError("sweep.space is empty: give it keys, such as sweep.space={optim.lr:{loguniform:[1e-5,1e-3]}}")
    hints = {key: hint for key, _, hint in declared()}
    space = {}
    for key, entry in flatten(config.sweep.space).items():
        if key not in hints:
            raise UserError(f"sweep.space: {key} is not an option{did_you_mean(key, hints)}")
        if any(key == part or key.startswith(part + ".") for part in FIXED_OPTIONS):
            raise UserError(f"sweep.space.{key}: it is the same for all trials: set it with {key}=...")
        space[key] = _parse_domain(key, entry, hints[key])
    space = sort_by_conditions(space)
    for key, domain in space.items():
        _check_condition(key, domain, space, config)
        needed = {other: values[0] for other, values in domain.when.items()}
        for value in domain.values:
            with_values(config, needed | {key: value})
    _check_fits_search(space, config)
    return space


def _parse_domain(key: str, entry: Any, hint: Any) -> Domain:
    """Parse one domain. Raises UserError if it is invalid."""
    known = [*KINDS, "when"]
    kinds = [kind for kind in entry if kind != "when"] if isinstance(entry, dict) else []
    if len(kinds) != 1:
        raise UserError(
            f"sweep.space.{key}: {entry} is not a domain: use {{KIND: [...]}} with one of {', '.join(KINDS)}"
        )
    (kind,) = kinds
    if kind not in KINDS:
        raise UserError(f"sweep.space.{key}: {kind} is not one of {', '.join(known)}{did_you_mean(kind, known)}")
    values, count = entry[kind], KINDS[kind]
    if not isinstance(values, list) or not values or len(values) != (count or len(values)):
        raise UserError(f"sweep.space.{key}: {kind} takes {'[low, high]' if count else 'a list'}, not {values}")
    for value in values:
        if value is not None and not is_of(value, hint):
            raise UserError(f"sweep.space.{key}: {value} is not {type_name(hint)}")
    if kind in ("uniform", "loguniform") and not is_of(0.5, hint):
        raise UserError(
            f"sweep.space.{key}: {kind} samples fractions, and this is {type_name(hint)}: use randint or choice"
        )
    if kind == "randint" and not (is_of(values[0], int) and is_of(values[1], int)):
        raise UserError(f"sweep.space.{key}: randint takes integers, not {values}")
    if count and not (values[0] < values[1] and (kind != "loguniform" or values[0] > 0)):
        raise UserError(
            f"sweep.space.{key}: {kind} {values} is not a range: use [low, high], low first, above 0 for loguniform"
        )
    when = entry.get("when", {})
    if not isinstance(when, dict) or ("when" in entry and not when):
        raise UserError(f"sweep.space.{key}: when={when} is not a condition: use when: {{OTHER_KEY: VALUE}}")
    conditions = {other: tuple(v) if isinstance(v, list) else (v,) for other, v in flatten_condition(when).items()}
    return Domain(kind, tuple(values), conditions)


def flatten_condition(when: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a condition with dotted keys, also if it was given as nested groups."""
    flat: dict[str, Any] = {}
    for key, value in when.items():
        flat |= flatten_condition(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def sort_by_conditions(space: SearchSpace) -> SearchSpace:
    """Put each key after the keys in its condition. Raises UserError for circular conditions."""
    ordered: SearchSpace = {}
    while len(ordered) < len(space):
        ready = [
            key for key, domain in space.items()
            if key not in ordered and all(other in ordered or other not in space for other in domain.when)
        ]  # fmt: skip
        if not ready:
            remaining = ", ".join(sorted(set(space) - set(ordered)))
            raise UserError(f"sweep.space: the conditions of {remaining} are circular: leave out one `when`")
        ordered |= {key: space[key] for key in ready}
    return ordered


def _check_condition(key: str, domain: Domain, space: SearchSpace, config: Config) -> None:
    known = [name for name, _, _ in declared()]
    for other, values in domain.when.items():
        if other not in known:
            raise UserError(f"sweep.space.{key}: when: {other} is not an option{did_you_mean(other, known)}")
        for value in values:
            with_values(config, {other: value})
            if other not in space and get(config, other) not in values:
                raise UserError(
                    f"sweep.space.{key} is never active: {other} is {get(config, other)} in every trial, not {value}: "
                    f"add {other} to the search space"
                )
            if other in space and space[other].is_listed and value not in space[other].values:
                raise UserError(
                    f"sweep.space.{key} is never active with {other}={value}: that is not in the list of {other}"
                )


def _check_fits_search(space: SearchSpace, config: Config) -> None:
    """Raise UserError for domains that the searcher or the scheduler cannot use."""
    sweep = config.sweep
    takes_grid = declared_in(SEARCHERS, sweep.searcher, "TAKES_GRID") and sweep.scheduler not in ("pbt", "pb2")
    for key, domain in space.items():
        if declared_in(SEARCHERS, sweep.searcher, "NEEDS_LISTED_VALUES") and not domain.is_listed:
            raise UserError(
                f"sweep.space.{key}: {domain.kind} has infinitely many values, and sweep.searcher={sweep.searcher} tries all: "
                "use choice"
            )
        if domain.kind == "grid" and not takes_grid:
            by = sweep.searcher if sweep.searcher != "random" else sweep.scheduler
            raise UserError(f"sweep.space.{key}: {by} chooses values itself and takes no grid: use choice")
        if sweep.scheduler in ("pbt", "pb2"):
            if not any(key == part or key.startswith(part + ".") for part in MUTABLE_OPTIONS):
                raise UserError(
                    f"sweep.space.{key}: sweep.scheduler={sweep.scheduler} changes params while a model trains, and this one "
                    "cannot be changed then: use another scheduler, or leave it out"
                )
            if domain.when:
                raise UserError(
                    f"sweep.space.{key}: sweep.scheduler={sweep.scheduler} takes no conditions: leave out `when`"
                )
    if sweep.scheduler == "pb2" and all(domain.is_listed for domain in space.values()):
        raise UserError("sweep.scheduler=pb2 models numbers, and sweep.space has choices only: use sweep.scheduler=pbt")


def flatten(space: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the space with dotted keys, also if it was given as nested groups (`sweep.space.optim.lr=...`)."""
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, dict) and not set(value) & set(KINDS) and all(isinstance(v, dict) for v in value.values()):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def sample_params(space: SearchSpace, config: Config, seed: int, index: int) -> dict[str, Any]:
    """Sample the params of trial `index`, with a generator for each key, so that adding a key does not change the others."""
    params: dict[str, Any] = {}
    for key, domain in space.items():
        if domain.is_active(params, config):
            generator = np.random.default_rng([seed, index, zlib.crc32(key.encode())])
            params[key] = domain.value_at(float(generator.random()))
    return params


def grid_params(space: SearchSpace, config: Config) -> list[dict[str, Any]]:
    """Return every combination of the listed values once; keys that are not active are left out."""
    combinations: dict[str, dict[str, Any]] = {}
    for chosen in itertools.product(*(domain.values for domain in space.values())):
        params: dict[str, Any] = {}
        for (key, domain), value in zip(space.items(), chosen, strict=True):
            if domain.is_active(params, config):
                params[key] = value
        combinations.setdefault(repr(params), params)
    return list(combinations.values())


def random_params(space: SearchSpace, config: Config, seed: int) -> list[dict[str, Any]]:
    """Return the params of each trial of a random search: samples, each with every combination of the grid values."""
    grid = {key: domain.values for key, domain in space.items() if domain.kind == "grid"}
    points = list(itertools.product(*grid.values()))
    trials = []
    for index in range(config.sweep.trials * len(points)):
        point = dict(zip(grid, points[index % len(points)], strict=True))
        fixed = {key: Domain("choice", (value,), space[key].when) for key, value in point.items()}
        trials.append(sample_params(space | fixed, config, seed, index))
    return trials


def num_trials(space: SearchSpace, config: Config) -> int:
    """Return the number of trials of a sweep."""
    if declared_in(SEARCHERS, config.sweep.searcher, "NEEDS_LISTED_VALUES"):
        return len(grid_params(space, config))
    return config.sweep.trials * math.prod(len(domain.values) for domain in space.values() if domain.kind == "grid")

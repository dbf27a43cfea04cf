"""The search space of a config: checked against the schema before anything starts, and the values drawn from it.

What is drawn at random is a pure function of the space, the seed and a trial's index: whatever happened in between, the
same command draws the same values again.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.config import Config, declared, get, is_of, type_name, with_values
from engine.errors import UserError, did_you_mean

KINDS = {
    "choice": None,
    "grid": None,
    "uniform": 2,
    "loguniform": 2,
    "randint": 2,
}  # kind -> values it takes (None: any number)
LISTED = ("choice", "grid")
# Groups and keys that say where a sweep runs or what becomes of it, so that no trial can have its own.
FIXED_OPTIONS = (
    "job", "name", "runs_dir", "resume", "profile", "bundle", "sweep", "evaluate", "card", "promote", "plan", "convert",
    "serve", "cluster", "tracking", "demo", "train.max_steps", "train.workers", "train.min_workers",
    "train.gpus_per_worker", "train.cpus_per_worker",
)  # fmt: skip
# What a model that is trained already can go on with another value of: its shape, its data and its optimizer's kind stay.
MUTABLE_OPTIONS = (
    "optim.lr", "optim.weight_decay", "optim.beta1", "optim.beta2", "optim.eps", "optim.momentum", "optim.clip", "schedule",
    "train.global_batch", "train.global_batch_tokens", "train.micro_batch", "model.dropout", "objective.mask_rate",
    "objective.noise_density", "objective.mean_span", "objective.z_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """The values that one key may take."""

    kind: str
    values: tuple[Any, ...]  # all of them, or (low, high)
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # other key -> values with which this key applies

    @property
    def listed(self) -> bool:
        """Whether the values are listed one by one."""
        return self.kind in LISTED

    def applies(self, params: dict[str, Any], config: Config) -> bool:
        """Tell whether the key applies, beside the values drawn so far; the others are the config's."""
        return all((params[key] if key in params else get(config, key)) in values for key, values in self.when.items())

    def at(self, place: float) -> Any:
        """Return the value at a place in [0, 1)."""
        if self.listed:
            return self.values[int(place * len(self.values))]
        low, high = self.values
        if self.kind == "randint":
            return int(low + math.floor(place * (high - low)))
        if self.kind == "loguniform":
            return float(min(high, max(low, math.exp(math.log(low) + place * (math.log(high) - math.log(low))))))
        return float(low + place * (high - low))

    def place(self, value: Any) -> float:
        """Return the place of a value in [0, 1]: what `at` turns into it again, but for rounding."""
        if self.listed:
            return (self.values.index(value) + 0.5) / len(self.values)
        low, high = self.values
        if self.kind == "loguniform":
            return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return (value - low + (0.5 if self.kind == "randint" else 0.0)) / (high - low)


SearchSpace = dict[str, Domain]  # each key comes after those that its condition names


def parse_search_space(config: Config) -> SearchSpace:
    """Return the domains of sweep.space. Raises UserError for a key, kind, value or condition that no trial could take."""
    if not config.sweep.space:
        raise UserError("sweep.space is empty: give it keys, such as sweep.space={optim.lr:{loguniform:[1e-5,1e-3]}}")
    hints = {key: hint for key, _, hint in declared()}
    space = {}
    for key, written in flatten(config.sweep.space).items():
        if key not in hints:
            raise UserError(f"sweep.space: {key} is not an option{did_you_mean(key, hints)}")
        if any(key == part or key.startswith(part + ".") for part in FIXED_OPTIONS):
            raise UserError(f"sweep.space.{key}: it is the same for all trials: say it with {key}=...")
        space[key] = _domain(key, written, hints[key])
    space = sort_by_conditions(space)
    for key, domain in space.items():
        _check_condition(key, domain, space, config)
        needed = {other: values[0] for other, values in domain.when.items()}
        for value in domain.values:
            with_values(config, needed | {key: value})
    _check_fits_search(space, config)
    return space


def _domain(key: str, written: Any, hint: Any) -> Domain:
    """Read one domain. Raises UserError for what is none."""
    known = [*KINDS, "when"]
    kinds = [kind for kind in written if kind != "when"] if isinstance(written, dict) else []
    if len(kinds) != 1:
        raise UserError(
            f"sweep.space.{key}: {written} is no domain: use {{KIND: [...]}} with one of {', '.join(KINDS)}"
        )
    (kind,) = kinds
    if kind not in KINDS:
        raise UserError(f"sweep.space.{key}: {kind} is not one of {', '.join(known)}{did_you_mean(kind, known)}")
    values, count = written[kind], KINDS[kind]
    if not isinstance(values, list) or not values or len(values) != (count or len(values)):
        raise UserError(f"sweep.space.{key}: {kind} takes {'[low, high]' if count else 'a list'}, not {values}")
    for value in values:
        if value is not None and not is_of(value, hint):
            raise UserError(f"sweep.space.{key}: {value} is not {type_name(hint)}")
    if kind in ("uniform", "loguniform") and not is_of(0.5, hint):
        raise UserError(
            f"sweep.space.{key}: {kind} draws fractions, and this is {type_name(hint)}: use randint or choice"
        )
    if kind == "randint" and not (is_of(values[0], int) and is_of(values[1], int)):
        raise UserError(f"sweep.space.{key}: randint takes integers, not {values}")
    if count and not (values[0] < values[1] and (kind != "loguniform" or values[0] > 0)):
        raise UserError(
            f"sweep.space.{key}: {kind} {values} is no range: use [low, high], low first, above 0 for loguniform"
        )
    when = written.get("when", {})
    if not isinstance(when, dict) or ("when" in written and not when):
        raise UserError(f"sweep.space.{key}: when={when} is no condition: use when: {{OTHER_KEY: VALUE}}")
    conditions = {other: tuple(v) if isinstance(v, list) else (v,) for other, v in flatten_condition(when).items()}
    return Domain(kind, tuple(values), conditions)


def flatten_condition(when: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a condition with dotted keys, also where it was given as nested groups."""
    flat: dict[str, Any] = {}
    for key, value in when.items():
        flat |= flatten_condition(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def sort_by_conditions(space: SearchSpace) -> SearchSpace:
    """Put each key after those that its condition names. Raises UserError for conditions that go in a circle."""
    ordered: SearchSpace = {}
    while len(ordered) < len(space):
        ready = [
            key for key, domain in space.items()
            if key not in ordered and all(other in ordered or other not in space for other in domain.when)
        ]  # fmt: skip
        if not ready:
            left = ", ".join(sorted(set(space) - set(ordered)))
            raise UserError(f"sweep.space: the conditions of {left} wait for each other: leave out one `when`")
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
                    f"sweep.space.{key} never applies: {other} is {get(config, other)} in every trial, not {value}: "
                    f"put {other} into the space too"
                )
            if other in space and space[other].listed and value not in space[other].values:
                raise UserError(f"sweep.space.{key} never applies with {other}={value}: that is not in its own list")


def _check_fits_search(space: SearchSpace, config: Config) -> None:
    """Raise UserError for domains that the searcher or the scheduler cannot use."""
    sweep = config.sweep
    for key, domain in space.items():
        if sweep.searcher == "grid" and not domain.listed:
            raise UserError(
                f"sweep.space.{key}: {domain.kind} has no end of values, and sweep.searcher=grid takes all: use choice"
            )
        if domain.kind == "grid" and (sweep.searcher in ("tpe", "bohb") or sweep.scheduler in ("pbt", "pb2")):
            by = sweep.searcher if sweep.searcher != "random" else sweep.scheduler
            raise UserError(f"sweep.space.{key}: {by} chooses for itself and takes no grid: use choice")
        if sweep.scheduler in ("pbt", "pb2"):
            if not any(key == part or key.startswith(part + ".") for part in MUTABLE_OPTIONS):
                raise UserError(
                    f"sweep.space.{key}: sweep.scheduler={sweep.scheduler} changes values while a model trains, and this one "
                    "cannot be changed then: use another scheduler, or leave it out"
                )
            if domain.when:
                raise UserError(
                    f"sweep.space.{key}: sweep.scheduler={sweep.scheduler} takes no conditions: leave out `when`"
                )
    if sweep.scheduler == "pb2" and all(domain.listed for domain in space.values()):
        raise UserError("sweep.scheduler=pb2 models numbers, and sweep.space has choices only: use sweep.scheduler=pbt")


def flatten(space: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the space with dotted keys, also where it was given as nested groups (`sweep.space.optim.lr=...`)."""
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, dict) and not set(value) & set(KINDS) and all(isinstance(v, dict) for v in value.values()):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def sample_params(space: SearchSpace, config: Config, seed: int, index: int) -> dict[str, Any]:
    """Draw the trial `index`: each key by a generator of its own, so that one more key leaves the others as they were."""
    params: dict[str, Any] = {}
    for key, domain in space.items():
        if domain.applies(params, config):
            generator = np.random.default_rng([seed, index, zlib.crc32(key.encode())])
            params[key] = domain.at(float(generator.random()))
    return params


def grid_params(space: SearchSpace, config: Config) -> list[dict[str, Any]]:
    """Return every combination of the listed values, once each; a key that doesn't apply is left out."""
    found: dict[str, dict[str, Any]] = {}
    for chosen in itertools.product(*(domain.values for domain in space.values())):
        params: dict[str, Any] = {}
        for (key, domain), value in zip(space.items(), chosen, strict=True):
            if domain.applies(params, config):
                params[key] = value
        found.setdefault(repr(params), params)
    return list(found.values())


def random_params(space: SearchSpace, config: Config, seed: int) -> list[dict[str, Any]]:
    """Return the values of each trial of a random search: draws, each under every combination of the grid's values."""
    grid = {key: domain.values for key, domain in space.items() if domain.kind == "grid"}
    points = list(itertools.product(*grid.values()))
    found = []
    for index in range(config.sweep.trials * len(points)):
        point = dict(zip(grid, points[index % len(points)], strict=True))
        chosen = {key: Domain("choice", (value,), space[key].when) for key, value in point.items()}
        found.append(sample_params(space | chosen, config, seed, index))
    return found


def num_trials(space: SearchSpace, config: Config) -> int:
    """Return how many trials a sweep has."""
    if config.sweep.searcher == "grid":
        return len(grid_params(space, config))
    return config.sweep.trials * math.prod(len(domain.values) for domain in space.values() if domain.kind == "grid")

"""Population-based training in rounds: models train side by side, and after each round the worst go on from the best.

Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846, with truncation selection. A model that exploits gets its donor's
whole checkpoint, which has no layout: weights, moments, step and place in the data are the donor's bit for bit, and only
the values change. Rounds make it exact: all are compared after the same number of steps, and a sweep that was killed goes
on with the round under way. No Ray in it.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.atomic_write import atomic_folder, write_atomically
from engine.config import Config
from engine.errors import UserError
from engine.sweep import trial_record
from engine.sweep.search_algorithm import PlaceTrial, trial_name
from engine.sweep.search_space import Domain, SearchSpace, sample_params
from engine.sweep.trial_record import Trial
from engine.train.checkpoint import step_folder
from engine.train.run_folder import RunFolder

STATE_FILE = "population.json"
RESAMPLE_PROBABILITY = (
    0.25  # share of the values that are drawn anew where the others are perturbed (Jaderberg et al. 2017)
)
PERTURBATION_FACTORS = (0.8, 1.2)  # by which a value is perturbed (ibid.)


@dataclass(frozen=True)
class Exploit:
    """One member took up another's checkpoint."""

    step: int
    member: int
    donor: int
    params: dict[str, Any]  # with which it goes on


@dataclass(frozen=True)
class Round:
    """What a round that is over has shown, member by member."""

    params: list[dict[str, Any]]
    before: list[float | None]  # the metric of the weights that a member began with; None: not known
    after: list[float | None]  # None: it failed


# (the rounds so far, the donor's values, the values that other members have just got, a generator) -> values to go on with
Explore = Callable[[list[Round], dict[str, Any], list[dict[str, Any]], np.random.Generator], dict[str, Any]]


@dataclass
class PopulationState:
    """All that a population's next round depends on."""

    interval: int  # steps of a round
    params: list[dict[str, Any]]  # of each member, in the round under way
    before: list[float | None]
    rounds: list[Round] = field(default_factory=list)  # those that are over
    ended: dict[int, float | None] = field(default_factory=dict)  # of the round under way
    exploits: list[Exploit] = field(default_factory=list)
    copied: bool = True  # whether the checkpoints of the latest exploits are in place
    trials: list[Trial] = field(default_factory=list)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> PopulationState:
        """Turn `asdict` of a state, read from JSON, into the state again."""
        return cls(
            interval=tree["interval"],
            params=tree["params"],
            before=tree["before"],
            rounds=[Round(**one) for one in tree["rounds"]],
            ended={int(index): value for index, value in tree["ended"].items()},
            exploits=[Exploit(**one) for one in tree["exploits"]],
            copied=tree["copied"],
            trials=[trial_record.trial_from_dict(one) for one in tree["trials"]],
        )


class PopulationBasedTraining:
    """Members that train in rounds."""

    in_parts = True

    def __init__(
        self,
        config: Config,
        folder: Path,
        metrics: Sequence[str],
        mode: str,
        space: SearchSpace,
        place: PlaceTrial,
        explore: Explore,
    ) -> None:
        """Begin, or go on with the round that was under way in `folder`."""
        self._config, self._folder, self._metrics, self._mode = config, folder, metrics, mode
        self._place, self._explore = place, explore
        self.total, self._steps, self._interval = (
            config.sweep.trials,
            config.train.max_steps,
            perturbation_interval(config),
        )
        self.broken = False  # no member is left that could be copied
        file = folder / STATE_FILE
        if file.exists():
            self.state = PopulationState.from_dict(json.loads(file.read_text()))
            if self.state.interval != self._interval or self.state.trials[0].budget != self._steps:
                raise UserError(
                    f"the models of sweep '{config.name}' are trained for {self.state.trials[0].budget:,} steps in rounds of "
                    f"{self.state.interval:,}: use another name, or these train.max_steps and sweep.interval"
                )
        else:
            drawn = [sample_params(space, config, config.seed, index) for index in range(self.total)]
            named = [Trial(i, trial_name(config, i), params, self._steps) for i, params in enumerate(drawn)]
            self.state = PopulationState(self._interval, drawn, [None] * self.total, trials=named)
        self.trials = {trial.index: trial for trial in self.state.trials}
        self._under_way: dict[int, float] = {}  # member -> when it began
        if not self.state.copied:
            self._copy()
        elif len(self.state.ended) == self.total and not self._last_round:
            self._evolve()

    @property
    def until(self) -> int:
        """The step with which the round under way ends."""
        return min(self._steps, (len(self.state.rounds) + 1) * self._interval)

    @property
    def _last_round(self) -> bool:
        return self.until == self._steps

    @property
    def done(self) -> bool:
        """Whether every member has been started in the last round."""
        started = len(self.state.ended) + len(self._under_way)
        return self.broken or (self._last_round and started == self.total)

    def next(self) -> dict[str, Any] | None:
        """Return the task of a member that has yet to go through the round; None where the others are to end it first."""
        for index, trial in self.trials.items():
            if self.broken or index in self.state.ended or index in self._under_way:
                continue
            self._under_way[index] = time.monotonic()
            trial.params, trial.state = self.state.params[index], "running"
            try:
                params, data = self._place(trial.params)
            except UserError as error:
                self.end(index, str(error))
                return self.next()
            since = len(self.state.rounds) * self._interval
            return {"index": index, "name": trial.name, "params": params, "since": since, "until": self.until,
                    "data": str(data)}  # fmt: skip
        return None

    def report(self, index: int, step: int, figures: dict[str, float], process: int) -> bool:
        """Hear of a validation; no member is stopped."""
        first, *others = self._metrics
        trial = self.trials[index]
        trial.hear(step, figures[first], {name: figures[name] for name in others})
        trial.process = process
        return False

    def end(self, index: int, reason: str | None) -> None:
        """Note how a member ended the round; the last to do so begins the next one."""
        trial = self.trials[index]
        trial.seconds += time.monotonic() - self._under_way.pop(index)
        trial.state, trial.reason = ("failed", reason) if reason is not None else ("finished", "")
        self.state.ended[index] = None if reason is not None else trial.value
        self._save()
        if len(self.state.ended) == self.total and not self._last_round:
            self._evolve()

    def _evolve(self) -> None:
        """Have the worst go on from the best, with other values."""
        state, step = self.state, self.until
        after = [state.ended[index] for index in range(self.total)]
        if all(value is None for value in after):
            self.broken = True
            return
        state.rounds.append(Round(state.params, state.before, after))
        params, before = list(state.params), list(after)
        for member, donor in select_exploits(after, self._mode, self._config.sweep.quantile, self._seed(step)):
            generator = np.random.default_rng([*self._seed(step), member])
            fresh = [e.params for e in state.exploits if e.step == step]
            params[member] = self._explore(state.rounds, state.params[donor], fresh, generator)
            before[member] = after[donor]
            state.exploits.append(Exploit(step, member, donor, params[member]))
        state.params, state.before, state.ended, state.copied = params, before, {}, False
        self._save()
        self._copy()

    def _copy(self) -> None:
        """Put the donors' checkpoints in place; done again where a kill came in between, while no donor has moved on."""
        step = len(self.state.rounds) * self._interval
        for exploit in self.state.exploits:
            if exploit.step == step:
                donor, clone = (RunFolder(self._folder / self.trials[i].name) for i in (exploit.donor, exploit.member))
                copy_checkpoint(donor, clone, step)
        self.state.copied = True
        self._save()

    def _seed(self, step: int) -> list[int]:
        return [self._config.seed, step, 1]

    def _save(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / STATE_FILE, json.dumps(asdict(self.state)))


def perturbation_interval(config: Config) -> int:
    """Return the steps of a round."""
    return config.sweep.interval or max(1, config.train.max_steps // 5)


def select_exploits(
    after: Sequence[float | None], mode: str, quantile: float, seed: Sequence[int]
) -> list[tuple[int, int]]:
    """Return (member, donor) for the worst `quantile`, and all that failed: each copies one of the best, drawn at random."""
    sign = 1.0 if mode == "min" else -1.0
    costs = [math.inf if value is None else sign * value for value in after]
    ranked = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    few = max(1, int(quantile * len(ranked)))
    best, generator = [i for i in ranked[:few] if costs[i] < math.inf], np.random.default_rng(list(seed))
    found = []
    for member in ranked[few:]:
        donor = best[int(generator.integers(len(best)))]
        if (member in ranked[-few:] or costs[member] == math.inf) and costs[donor] < costs[member]:
            found.append((member, donor))
    return found


def copy_checkpoint(donor: RunFolder, clone: RunFolder, step: int) -> None:
    """Give a run another's checkpoint after `step` steps, and the lines that led to it, instead of its own."""
    with atomic_folder(clone.checkpoints) as part:
        shutil.copytree(step_folder(donor.checkpoints, step), step_folder(part, step))
    shutil.copyfile(donor.metrics_file, clone.metrics_file)


def pbt_explore(space: SearchSpace) -> Explore:
    """Return the exploration of Jaderberg et al. 2017: each value is drawn anew, or multiplied by 0.8 or 1.2."""

    def explore(
        rounds: list[Round], params: dict[str, Any], chosen: list[dict[str, Any]], generator: np.random.Generator
    ) -> dict[str, Any]:
        return {key: perturb_value(domain, params[key], generator) for key, domain in space.items()}

    return explore


def perturb_value(domain: Domain, value: Any, generator: np.random.Generator) -> Any:
    """Return another value near this one, within its domain; a listed one moves to a neighbour."""
    if generator.random() < RESAMPLE_PROBABILITY:
        return domain.at(float(generator.random()))
    up = bool(generator.random() < 0.5)
    if domain.listed:
        place = domain.values.index(value) + (1 if up else -1)
        return domain.values[min(len(domain.values) - 1, max(0, place))]
    low, high = domain.values
    moved = value * PERTURBATION_FACTORS[up]
    if domain.kind == "randint":
        moved = round(moved) if round(moved) != value else value + (1 if up else -1)
        high -= 1
    return min(high, max(low, moved))

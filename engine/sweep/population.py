"""Population-based training (PBT): members train in rounds; after each, the worst copy the best (exploit) and change params.

Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846, with truncation selection. A member that exploits copies its
donor's whole checkpoint (weights, moments, step, position in the data), so only its params differ. A round is a perturbation
interval: all members are compared after the same number of steps, and a sweep that was killed resumes the current round.
Uses no Ray.
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
from engine.sweep.search_algorithm import PlaceTrial, trial_name
from engine.sweep.search_space import Domain, SearchSpace, sample_params
from engine.sweep.trial_record import Trial, TrialTask, trial_from_dict
from engine.train.checkpoint import step_folder
from engine.train.run_folder import RunFolder

STATE_FILE = "population.json"
RESAMPLE_PROBABILITY = 0.25  # that a value is resampled instead of perturbed (Jaderberg et al. 2017)
PERTURBATION_FACTORS = (0.8, 1.2)  # on a perturbed value (ibid.)


@dataclass(frozen=True)
class Exploit:
    """A member copied another's checkpoint."""

    step: int
    member: int
    donor: int
    params: dict[str, Any]  # with which it continues


@dataclass(frozen=True)
class Round:
    """The results of a finished round, by member."""

    params: list[dict[str, Any]]
    before: list[float | None]  # metric of the weights at the start of the round; None: unknown
    after: list[float | None]  # metric at its end; None: the member failed


# (finished rounds, the donor's params, params just chosen for other members, random generator) -> params to continue with
Explore = Callable[[list[Round], dict[str, Any], list[dict[str, Any]], np.random.Generator], dict[str, Any]]


@dataclass
class PopulationState:
    """Everything that the next round of a population depends on; written to population.json."""

    interval: int  # steps of a round
    params: list[dict[str, Any]]  # of each member, in the current round
    before: list[float | None]
    rounds: list[Round] = field(default_factory=list)  # finished ones
    ended: dict[int, float | None] = field(
        default_factory=dict
    )  # in the current round: member -> metric, None if it failed
    exploits: list[Exploit] = field(default_factory=list)
    copied: bool = True  # whether the checkpoints of the latest exploits are copied
    trials: list[Trial] = field(default_factory=list)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> PopulationState:
        """Return the state whose `asdict`, read from JSON, this is."""
        return cls(
            interval=tree["interval"],
            params=tree["params"],
            before=tree["before"],
            rounds=[Round(**item) for item in tree["rounds"]],
            ended={int(index): value for index, value in tree["ended"].items()},
            exploits=[Exploit(**item) for item in tree["exploits"]],
            copied=tree["copied"],
            trials=[trial_from_dict(item) for item in tree["trials"]],
        )


class PopulationBasedTraining:
    """A search algorithm whose trials are the members of a population."""

    has_partial_tasks = True

    def __init__(
        self,
        config: Config,
        folder: Path,
        metrics: Sequence[str],
        mode: str,
        space: SearchSpace,
        place_trial: PlaceTrial,
        explore: Explore,
    ) -> None:
        """Start, or resume the round that was interrupted in `folder`."""
        self._config, self._folder, self._metrics, self._mode = config, folder, metrics, mode
        self._place_trial, self._explore = place_trial, explore
        self.total, self._max_steps = config.sweep.trials, config.train.max_steps
        self._interval = perturbation_interval(config)
        self.has_failed = False  # all members have failed
        file = folder / STATE_FILE
        if file.exists():
            self.state = PopulationState.from_dict(json.loads(file.read_text()))
            if self.state.interval != self._interval or self.state.trials[0].budget != self._max_steps:
                raise UserError(
                    f"the models of sweep '{config.name}' are trained for {self.state.trials[0].budget:,} steps in rounds of "
                    f"{self.state.interval:,}: use another name, or these train.max_steps and sweep.perturbation_interval"
                )
        else:
            sampled = [sample_params(space, config, config.seed, index) for index in range(self.total)]
            trials = [Trial(i, trial_name(config, i), params, self._max_steps) for i, params in enumerate(sampled)]
            self.state = PopulationState(self._interval, sampled, [None] * self.total, trials=trials)
        self.trials = {trial.index: trial for trial in self.state.trials}
        self._running: dict[int, float] = {}  # member -> start time
        if not self.state.copied:
            self._copy_checkpoints()
        elif len(self.state.ended) == self.total and not self._is_last_round:
            self._exploit_and_explore()

    @property
    def round_end_step(self) -> int:
        """The last step of the current round."""
        return min(self._max_steps, (len(self.state.rounds) + 1) * self._interval)

    @property
    def _is_last_round(self) -> bool:
        return self.round_end_step == self._max_steps

    @property
    def is_done(self) -> bool:
        """Whether every member has been started in the last round."""
        started = len(self.state.ended) + len(self._running)
        return self.has_failed or (self._is_last_round and started == self.total)

    def next_task(self) -> TrialTask | None:
        """Return the task of a member that has not trained in the current round; None if there is none."""
        for index, trial in self.trials.items():
            if self.has_failed or index in self.state.ended or index in self._running:
                continue
            self._running[index] = time.monotonic()
            trial.params, trial.state = self.state.params[index], "running"
            try:
                params, data = self._place_trial(trial.params)
            except UserError as error:
                self.on_end(index, str(error))
                return self.next_task()
            start_step = len(self.state.rounds) * self._interval
            return TrialTask(index, trial.name, params, start_step, self.round_end_step, str(data))
        return None

    def on_report(self, index: int, step: int, metrics: dict[str, float], process: int) -> bool:
        """Record a validation result; no member is stopped."""
        first, *others = self._metrics
        trial = self.trials[index]
        trial.record_validation(step, metrics[first], {name: metrics[name] for name in others})
        trial.process = process
        return False

    def on_end(self, index: int, error: str | None) -> None:
        """Record a member's result of the round; after the last member, start the next round."""
        trial = self.trials[index]
        trial.seconds += time.monotonic() - self._running.pop(index)
        trial.state, trial.reason = ("failed", error) if error is not None else ("finished", "")
        self.state.ended[index] = None if error is not None else trial.value
        self._save()
        if len(self.state.ended) == self.total and not self._is_last_round:
            self._exploit_and_explore()

    def _exploit_and_explore(self) -> None:
        """Start the next round: the worst members copy the best ones and get new params."""
        state, step = self.state, self.round_end_step
        after = [state.ended[index] for index in range(self.total)]
        if all(value is None for value in after):
            self.has_failed = True
            return
        state.rounds.append(Round(state.params, state.before, after))
        params, before = list(state.params), list(after)
        for member, donor in select_exploits(after, self._mode, self._config.sweep.quantile_fraction, self._seed(step)):
            generator = np.random.default_rng([*self._seed(step), member])
            chosen = [e.params for e in state.exploits if e.step == step]
            params[member] = self._explore(state.rounds, state.params[donor], chosen, generator)
            before[member] = after[donor]
            state.exploits.append(Exploit(step, member, donor, params[member]))
        state.params, state.before, state.ended, state.copied = params, before, {}, False
        self._save()
        self._copy_checkpoints()

    def _copy_checkpoints(self) -> None:
        """Copy the donors' checkpoints. Repeated after a kill in between, before any donor trains further."""
        step = len(self.state.rounds) * self._interval
        for exploit in self.state.exploits:
            if exploit.step == step:
                donor, member = (RunFolder(self._folder / self.trials[i].name) for i in (exploit.donor, exploit.member))
                copy_checkpoint(donor, member, step)
        self.state.copied = True
        self._save()

    def _seed(self, step: int) -> list[int]:
        return [self._config.seed, step, 1]

    def _save(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / STATE_FILE, json.dumps(asdict(self.state)))


def perturbation_interval(config: Config) -> int:
    """Return the number of steps of a round."""
    return config.sweep.perturbation_interval or max(1, config.train.max_steps // 5)


def select_exploits(
    after: Sequence[float | None], mode: str, quantile: float, seed: Sequence[int]
) -> list[tuple[int, int]]:
    """Return (member, donor) for the worst `quantile` fraction and failed members; donors are drawn from the best fraction."""
    sign = 1.0 if mode == "min" else -1.0
    costs = [math.inf if value is None else sign * value for value in after]
    ranked = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    size = max(1, int(quantile * len(ranked)))
    best, generator = [i for i in ranked[:size] if costs[i] < math.inf], np.random.default_rng(list(seed))
    exploits = []
    for member in ranked[size:]:
        donor = best[int(generator.integers(len(best)))]
        if (member in ranked[-size:] or costs[member] == math.inf) and costs[donor] < costs[member]:
            exploits.append((member, donor))
    return exploits


def copy_checkpoint(donor: RunFolder, member: RunFolder, step: int) -> None:
    """Replace a run's checkpoints and metrics by the donor's checkpoint after `step` steps and its metrics."""
    with atomic_folder(member.checkpoints) as part:
        shutil.copytree(step_folder(donor.checkpoints, step), step_folder(part, step))
    shutil.copyfile(donor.metrics_file, member.metrics_file)


def pbt_explore(space: SearchSpace) -> Explore:
    """Return PBT's explore function (Jaderberg et al. 2017): each value is resampled, or multiplied by 0.8 or 1.2."""

    def explore(
        rounds: list[Round], params: dict[str, Any], chosen: list[dict[str, Any]], generator: np.random.Generator
    ) -> dict[str, Any]:
        return {key: perturb_value(domain, params[key], generator) for key, domain in space.items()}

    return explore


def perturb_value(domain: Domain, value: Any, generator: np.random.Generator) -> Any:
    """Return a perturbed or resampled value within the domain; a listed value moves to an adjacent one."""
    if generator.random() < RESAMPLE_PROBABILITY:
        return domain.value_at(float(generator.random()))
    up = bool(generator.random() < 0.5)
    if domain.is_listed:
        index = domain.values.index(value) + (1 if up else -1)
        return domain.values[min(len(domain.values) - 1, max(0, index))]
    low, high = domain.values
    perturbed = value * PERTURBATION_FACTORS[up]
    if domain.kind == "randint":
        perturbed = round(perturbed) if round(perturbed) != value else value + (1 if up else -1)
        high -= 1
    return min(high, max(low, perturbed))

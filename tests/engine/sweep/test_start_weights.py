"""A trial's model copied from the object store is bit for bit the one that it would have made itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.sweep.start_weights import StartState, make_start_state, start_state_factory, start_state_key
from engine.train.init_model import load_or_init
from engine.train.job import TrainJob
from tests.lives import Lives


def check_equal(job: TrainJob, state: StartState) -> None:
    made = load_or_init(job, job.objective())
    random_after = torch.rand(3)
    state = replace(state, tensors={name: np.array(array) for name, array in state.tensors.items()})
    for array in state.tensors.values():
        array.flags.writeable = False  # as in shared memory
    copied = start_state_factory(state)(job, job.objective())
    assert torch.equal(torch.rand(3), random_after)  # dropout continues with the same random numbers
    assert made.training == copied.training
    assert made.config.to_dict() == copied.config.to_dict()
    for kind in ("named_parameters", "named_buffers"):
        actual, expected = dict(getattr(made, kind)()), dict(getattr(copied, kind)())
        assert list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in actual)
    for parameter in copied.parameters():
        parameter.data.add_(1)  # its own memory


def test_random_and_bundle_weights_are_copied_bit_for_bit(tiny: Config, lives: Lives) -> None:
    untrained = TrainJob(tiny, prepare(tiny))
    check_equal(untrained, make_start_state(untrained))
    start = lives.runs_dir / "base" / "bundle"
    tuned = TrainJob(lives.labelled, prepare(lives.labelled, start), start)
    state = make_start_state(tuned)
    check_equal(tuned, state)
    check_equal(replace(tuned, config=with_values(lives.labelled, {"model.dropout": 0.1, "optim.lr": 1e-4})), state)


def test_a_job_with_another_start_makes_its_own_weights(tiny: Config) -> None:
    job = TrainJob(tiny, prepare(tiny))
    other = replace(job, config=with_values(tiny, {"seed": 1}))
    state = make_start_state(job)
    assert start_state_key(other) != state.key
    model = start_state_factory(state)(other, other.objective())
    expected = load_or_init(other, other.objective())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))

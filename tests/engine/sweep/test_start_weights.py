"""A trial's model from the object store is, bit for bit, the one that it would have made itself."""

from __future__ import annotations

from dataclasses import replace as swap

import numpy as np
import torch

from engine.config import Config, with_values
from engine.data.prepare import prepare
from engine.sweep.start_weights import start_state_factory, start_state_key, make_start_state
from engine.train.init_model import load_or_init
from engine.train.job import TrainJob
from tests.lives import Lives


def equal(job: TrainJob, state: dict) -> None:  # type: ignore[type-arg]
    made = load_or_init(job, job.objective())
    drawn = torch.rand(3)
    state["tensors"] = {name: np.array(array) for name, array in state["tensors"].items()}
    for array in state["tensors"].values():
        array.flags.writeable = False  # as in shared memory
    copied = start_state_factory(state)(job, job.objective())
    assert torch.equal(torch.rand(3), drawn)  # dropout goes on from the same numbers
    assert made.training == copied.training
    assert made.config.to_dict() == copied.config.to_dict()
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(made, kind)()), dict(getattr(copied, kind)())
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for parameter in copied.parameters():
        parameter.data.add_(1)  # its own memory


def test_fresh_weights_and_a_bundle_s_are_copied_bit_for_bit(tiny: Config, lives: Lives) -> None:
    untrained = TrainJob(tiny, prepare(tiny))
    equal(untrained, make_start_state(untrained))
    start = lives.runs_dir / "base" / "bundle"
    tuned = TrainJob(lives.labelled, prepare(lives.labelled, start), start)
    state = make_start_state(tuned)
    equal(tuned, state)
    equal(swap(tuned, config=with_values(lives.labelled, {"model.dropout": 0.1, "optim.lr": 1e-4})), state)


def test_another_start_is_made_as_ever(tiny: Config) -> None:
    job = TrainJob(tiny, prepare(tiny))
    other = swap(job, config=with_values(tiny, {"seed": 1}))
    state = make_start_state(job)
    assert start_state_key(other) != state["facts"]
    model = start_state_factory(state)(other, other.objective())
    expected = load_or_init(other, other.objective())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))

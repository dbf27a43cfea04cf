"""The initial weights of all trials: made once, put into Ray's object store once, and copied from there by each trial."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import select
from engine.objectives.contract import Objective
from engine.train.init_model import ModelFactory, empty_model, load_or_init, named_tensors
from engine.train.job import TrainJob


@dataclass(frozen=True)
class StartState:
    """The initial weights of a job, and the random state after their creation."""

    key: str  # everything that the weights depend on
    tensors: dict[str, np.ndarray]  # of all parameters and buffers, by name
    random_state: np.ndarray  # torch's


def make_start_state(job: TrainJob) -> StartState:
    """Make the start state of a job, with the arrays of the model that `load_or_init` returns."""
    import torch

    model = load_or_init(job, job.objective())
    tensors = {name: tensor.detach().numpy() for name, tensor in named_tensors(model)}
    return StartState(start_state_key(job), tensors, np.array(torch.get_rng_state()))


def start_state_factory(state: StartState) -> ModelFactory:
    """Return a model factory that copies the start state if it is the job's, and otherwise makes the model itself."""

    def make_model(job: TrainJob, objective: Objective) -> Any:
        return (
            copy_start_state(state, job, objective)
            if state.key == start_state_key(job)
            else load_or_init(job, objective)
        )

    return make_model


def copy_start_state(state: StartState, job: TrainJob, objective: Objective) -> Any:
    """Make the model without weights, and copy the weights into it: bit for bit the result of `load_or_init`.

    The arrays may be read-only views of shared memory; they are not changed.
    """
    import torch

    torch.manual_seed(job.config.seed)
    model: Any = empty_model(job, objective)
    for name, tensor in named_tensors(model):
        tensor.data = torch.from_numpy(np.array(state.tensors[name]))
    torch.set_rng_state(torch.from_numpy(np.array(state.random_state)))
    return model.eval() if job.start_bundle else model


def start_state_key(job: TrainJob) -> str:
    """Return everything that the initial weights depend on; dropout and the attention implementation do not count."""
    facts = select(job.config, "start_weights")
    return json.dumps(
        [facts, str(job.data_folder), str(job.start_bundle and Path(job.start_bundle).resolve())], sort_keys=True
    )

"""The start state of all trials: made once, put into the object store once, and copied from there by every trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import select
from engine.objectives.contract import Objective
from engine.train.init_model import ModelFactory, empty_model, load_or_init, named_tensors
from engine.train.job import TrainJob

StartState = dict[
    str, Any
]  # "facts": what it depends on, "tensors": name -> array, "random": torch's state after its making


def make_start_state(job: TrainJob) -> StartState:
    """Make the start state of a job; the arrays are what `load_or_init` made."""
    import torch

    model = load_or_init(job, job.objective())
    return {
        "facts": start_state_key(job),
        "tensors": {name: tensor.detach().numpy() for name, tensor in named_tensors(model)},
        "random": np.array(torch.get_rng_state()),
    }


def start_state_factory(state: StartState) -> ModelFactory:
    """Return what makes a trial's model from the start state, where that is the trial's, and else as any other job's is made."""

    def make(job: TrainJob, objective: Objective) -> Any:
        return (
            copy_start_state(state, job, objective)
            if state["facts"] == start_state_key(job)
            else load_or_init(job, objective)
        )

    return make


def copy_start_state(state: StartState, job: TrainJob, objective: Objective) -> Any:
    """Make the module without any weights, and copy the weights into it: bit for bit what `load_or_init` makes.

    The arrays may be read-only views of shared memory, which they stay.
    """
    import torch

    torch.manual_seed(job.config.seed)
    model: Any = empty_model(job, objective)
    for name, tensor in named_tensors(model):
        tensor.data = torch.from_numpy(np.array(state["tensors"][name]))
    torch.set_rng_state(torch.from_numpy(np.array(state["random"])))
    return model.eval() if job.start_bundle else model


def start_state_key(job: TrainJob) -> str:
    """Return all that a start state depends on; dropout and the attention implementation don't change the weights."""
    facts = select(job.config, "start_weights")
    return json.dumps(
        [facts, str(job.data_folder), str(job.start_bundle and Path(job.start_bundle).resolve())], sort_keys=True
    )

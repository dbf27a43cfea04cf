"""The start state of all trials: made once, put into the object store once, and copied from there by every trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import identity
from engine.objectives.contract import Objective
from engine.train.init_model import Make, empty_model, fresh, held
from engine.train.job import Job

StartState = dict[
    str, Any
]  # "facts": what it depends on, "tensors": name -> array, "random": torch's state after its making


def start_state(job: Job) -> StartState:
    """Make the start state of a job; the arrays are what `fresh` made."""
    import torch

    model = fresh(job, job.objective())
    return {
        "facts": deciding(job),
        "tensors": {name: tensor.detach().numpy() for name, tensor in held(model)},
        "random": np.array(torch.get_rng_state()),
    }


def copier(state: StartState) -> Make:
    """Return what makes a trial's model from the start state, where that is the trial's, and else as any other job's is made."""

    def make(job: Job, objective: Objective) -> Any:
        return copied(state, job, objective) if state["facts"] == deciding(job) else fresh(job, objective)

    return make


def copied(state: StartState, job: Job, objective: Objective) -> Any:
    """Make the module without any weights, and copy the weights into it: bit for bit what `fresh` makes.

    The arrays may be read-only views of shared memory, which they stay.
    """
    import torch

    torch.manual_seed(job.config.seed)
    model: Any = empty_model(job, objective)
    for name, tensor in held(model):
        tensor.data = torch.from_numpy(np.array(state["tensors"][name]))
    torch.set_rng_state(torch.from_numpy(np.array(state["random"])))
    return model.eval() if job.start else model


def deciding(job: Job) -> str:
    """Return all that a start state depends on; dropout and the kind of attention are no part of the weights."""
    keys = ("seed", "objective.name", "model.", "data.")
    apart = ("model.dropout", "model.attention")
    facts = {key: v for key, v in identity(job.config, apart).items() if key.startswith(keys)}
    return json.dumps([facts, str(job.data), str(job.start and Path(job.start).resolve())], sort_keys=True)

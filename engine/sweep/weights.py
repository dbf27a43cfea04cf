"""The start state of all trials: made once, put into the object store once, and copied from there by every trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import identity
from engine.objectives.contract import Objective
from engine.train.worker import Job, make_model

StartState = dict[
    str, Any
]  # "facts": what it depends on, "tensors": name -> array, "random": torch's state after its making


def start_state(job: Job) -> StartState:
    """Make the start state of a job; the arrays are what `make_model` made."""
    import torch

    model = make_model(job, job.objective())
    return {
        "facts": deciding(job),
        "tensors": {name: tensor.detach().numpy() for name, tensor in _tensors(model)},
        "random": np.array(torch.get_rng_state()),
    }


def copier(state: StartState) -> Callable[[Job, Objective], Any]:
    """Return what makes a trial's model from the start state, where that is the trial's, and else as any other job's is made."""

    def make(job: Job, objective: Objective) -> Any:
        return copied(state, job, objective) if state["facts"] == deciding(job) else make_model(job, objective)

    return make


def copied(state: StartState, job: Job, objective: Objective) -> Any:
    """Make the module without initializing it, and copy the weights into it: bit for bit what `make_model` makes.

    The arrays may be read-only views of shared memory, which they stay.
    """
    import torch
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    from engine.models.build import from_config, set_dropout, transformers_config

    options, model = objective.model_options(), job.config.model
    if job.start:
        shape = set_dropout(AutoConfig.from_pretrained(job.start, local_files_only=True, **options), model)
    else:
        shape = transformers_config(model, objective.processor, options)
    torch.manual_seed(job.config.seed)
    with no_init_weights():
        made: Any = from_config(shape, objective.auto_class, dtype=torch.float32, attn_implementation=model.attention)
    made.tie_weights()
    with torch.no_grad():
        for name, tensor in _tensors(made):
            np.copyto(tensor.detach().numpy(), state["tensors"][name])
    torch.set_rng_state(torch.from_numpy(np.array(state["random"])))
    return made.eval() if job.start else made


def deciding(job: Job) -> str:
    """Return all that a start state depends on; dropout and the kind of attention are no part of the weights."""
    keys = ("seed", "objective.name", "model.", "data.")
    apart = ("model.dropout", "model.attention")
    facts = {key: v for key, v in identity(job.config, apart).items() if key.startswith(keys)}
    return json.dumps([facts, str(job.data), str(job.start and Path(job.start).resolve())], sort_keys=True)


def _tensors(model: Any) -> list[tuple[str, Any]]:
    return [*model.named_parameters(), *model.named_buffers()]

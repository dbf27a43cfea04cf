"""Imports what a rank needs, while Ray Train's controller still arranges the run.

Ray imports this module in each worker process that it starts (`RAY_preload_python_modules`); only those that will be
ranks of a run carry `RANK`, and so only they take the time.
"""

from __future__ import annotations

import gc
import importlib
import os

RANK = "MANTA_RANK"  # an environment variable
NEEDED = ("ray.train", "transformers.modeling_layers", "engine.train.trainer", "engine.train.worker")

if os.environ.get(RANK):
    gc.disable()  # it would take a quarter of the time of all imports
    for module in NEEDED:
        importlib.import_module(module)
    from engine.train.zero import import_deepspeed

    import_deepspeed()
    gc.enable()

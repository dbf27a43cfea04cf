"""Imports what a rank needs, while Ray Train's controller is still setting up the worker group.

Ray imports this module in each worker process that it starts (`RAY_preload_python_modules`). Only processes that will be
ranks have RANK_VARIABLE set, so only they spend the time.
"""

from __future__ import annotations

import gc
import importlib
import os

RANK_VARIABLE = "MANTA_RANK"  # an environment variable, set in processes that will be ranks
MODULES = ("ray.train", "transformers.modeling_layers", "engine.train.trainer", "engine.train.worker")

if os.environ.get(RANK_VARIABLE):
    gc.disable()  # collections would take a quarter of the imports' time
    for module in MODULES:
        importlib.import_module(module)
    from engine.train.zero import import_deepspeed

    import_deepspeed()
    gc.enable()

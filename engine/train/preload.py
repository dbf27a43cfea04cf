"""Imports what a rank needs, while Ray Train's controller still arranges the run.

Ray imports this module in each worker process that it starts (`RAY_preload_python_modules`); only those that will be
ranks of a run carry `RANK`, and so only they take the time.
"""

from __future__ import annotations

import gc
import os

RANK = "MANTA_RANK"  # an environment variable

if os.environ.get(RANK):
    gc.disable()  # it would take a quarter of the time of all imports
    from transformers import AutoModel  # noqa: F401

    from engine.train.zero import import_deepspeed

    import_deepspeed()
    gc.enable()

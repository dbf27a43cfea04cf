"""The modules that ranks import in advance."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from engine.train.preload import MODULES


def test_all_preloaded_modules_exist() -> None:
    assert all(importlib.util.find_spec(module) for module in MODULES)


def test_a_process_that_is_no_rank_imports_nothing() -> None:
    code = "import sys, engine.train.preload; print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"

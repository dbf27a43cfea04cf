"""Builds and loads the C++ operations of `manta` for CPUs: once for a machine, in torch's folder of extensions.

Torch's own attention takes a step's slots as one batch, up to the longest of them and with a mask; the one here goes
through each slot's tokens once, up to its own length. Linear layers are made for the few rows of a step, and a model of
Llama's kind runs as a whole (`decoder`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from pathlib import Path

import ninja
import torch

NAME = "manta_kernels"
SOURCES = Path(__file__).with_name("cpp")
LOG = logging.getLogger(__name__)


@functools.cache
def load() -> bool:
    """Load the operations, and build them unless they are there; False: this machine has no compiler for them."""
    try:
        library = build()
    except (RuntimeError, OSError) as error:
        LOG.warning("models run by torch's own operations, which take longer: %s can't be built (%s)", SOURCES, str(error).splitlines()[0])  # fmt: skip
        return False
    torch.ops.load_library(library)
    return True


def build() -> Path:
    """Return the library for this CPU and this version of torch. Raises RuntimeError, OSError."""
    from torch.utils import cpp_extension  # takes a third of a second

    capability = torch.backends.cpu.get_cpu_capability()
    sources = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    key = (sources, torch.__version__, capability, platform.python_version(), cpu_flags())
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library = folder / NAME / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", os.defpath)))
    with tempfile.TemporaryDirectory(dir=library.parent) as build_folder:  # no lock: a killed build blocks no other one
        vector_flags = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"] if capability.startswith("AVX") else []  # fmt: skip
        cpp_extension.load(  # "standalone" leaves the loading to us
            NAME, [str(SOURCES / "operations.cpp")], build_directory=build_folder, is_python_module=False, is_standalone=True,
            extra_ldflags=["-shared", "-fopenmp"],
            extra_cflags=["-O3", "-march=native", "-fopenmp", "-fPIC", "-DAT_PARALLEL_OPENMP=1", *vector_flags],
        )  # fmt: skip
        shutil.move(Path(build_folder, NAME), library)
    return library


def cpu_flags() -> str:
    """Return the instruction sets of this CPU: CPUs of several kinds may share a folder of extensions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())

"""The operations of `manta` for tensors on a processor, in C++: built once for a machine, and kept in torch's folder of extensions.

Torch's own attention looks at a step's lanes as one batch, up to the longest of them and with a mask; the one here goes
through each lane's tokens once, as far as they go. Products are made for the few rows of a step, and a model of Llama's kind
runs as a whole (`decoder`).
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
    """Load the operations, and build them unless they are there; False: this machine has no compiler that can."""
    try:
        library = built()
    except (RuntimeError, OSError) as error:
        LOG.warning("models run by torch's own operations, which take longer: %s can't be built (%s)", SOURCES, str(error).splitlines()[0])  # fmt: skip
        return False
    torch.ops.load_library(library)
    return True


def built() -> Path:
    """Return the library for this processor and this torch. Raises RuntimeError, OSError."""
    from torch.utils import cpp_extension  # takes a third of a second

    kind = torch.backends.cpu.get_cpu_capability()
    texts = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    machine = (texts, torch.__version__, kind, platform.python_version(), processor())
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library = folder / NAME / f"{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", os.defpath)))
    with tempfile.TemporaryDirectory(dir=library.parent) as own:  # no lock: who is killed while it builds stops nobody
        wide = [f"-DCPU_CAPABILITY={kind}", f"-DCPU_CAPABILITY_{kind}"] if kind.startswith("AVX") else []
        cpp_extension.load(  # "standalone" leaves the loading to us
            NAME, [str(SOURCES / "operations.cpp")], build_directory=own, is_python_module=False, is_standalone=True, extra_ldflags=["-shared", "-fopenmp"],
            extra_cflags=["-O3", "-march=native", "-fopenmp", "-fPIC", "-DAT_PARALLEL_OPENMP=1", *wide],
        )  # fmt: skip
        shutil.move(Path(own, NAME), library)
    return library


def processor() -> str:
    """Name what code for this machine may use: a folder of extensions may be shared by several kinds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())

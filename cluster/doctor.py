"""`manta doctor`: is this machine fit for the jobs, and what to do where it isn't."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from cluster import state
from cluster.environment import has_gpu, quiet_environment
from cluster.ports import holder

GIB = 2**30
BUILD_DATE = 1_767_225_600  # 2026-01-01: a clock before it is wrong


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    verdict: str  # ok, warn or fail
    found: str
    advice: str = ""


def judge(what: str, good: bool, found: str, advice: str, otherwise: str = "warn") -> Finding:
    """Return an ok row, or one with advice."""
    return Finding(what, "ok", found) if good else Finding(what, otherwise, found, advice)


def python() -> Iterator[Finding]:
    """Check the Python version."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield judge("Python", fits, platform.python_version(), "use Python 3.11, 3.12 or 3.13", "fail")


def compilers() -> Iterator[Finding]:
    """Check g++, ninja and make; DeepSpeed builds its collective with the first two."""
    fixes = {
        "g++": "install it (Debian, Ubuntu: apt install g++): DeepSpeed builds its collective with it",
        "ninja": "pip install ninja: DeepSpeed builds its collective with it",
        "make": "install it (Debian, Ubuntu: apt install make): `make demo` and `make test` need it",
    }
    for program, advice in fixes.items():
        # a package's program lies beside python, also where its environment is not activated
        path = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
        yield judge(program, path is not None, path or "missing", advice, "warn" if program == "make" else "fail")


def packages() -> Iterator[Finding]:
    """Check each package's version against pyproject's range."""
    wrong = []
    requirements = [Requirement(r) for r in declared()]
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    good = f"{len(requirements)} in their ranges"
    yield judge("packages", not wrong, "; ".join(wrong) or good, "pip install -e . (or `make install`)", "fail")


def declared() -> list[str]:
    """Return the requirements without extras: of the source tree, else of the installed package."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        import tomllib

        return tomllib.loads(project.read_text())["project"]["dependencies"]
    return [r for r in importlib.metadata.requires("manta-train") or [] if "extra ==" not in r]


def room() -> Iterator[Finding]:
    """Check shared memory, disk and memory, in GiB."""
    try:
        free = shutil.disk_usage("/dev/shm").free / GIB
        advice = "give the container more (docker run --shm-size=4g): Ray's object store would spill to disk"
        yield judge("shared memory", free >= 1, f"{free:.1f} GiB free", advice)
    except FileNotFoundError:
        yield Finding("shared memory", "ok", "no /dev/shm here: Ray uses files")
    runs = Path("runs") if Path("runs").exists() else Path.cwd()
    for what, path in (("disk for runs", runs), ("disk for temporary files", Path("/tmp"))):
        free = shutil.disk_usage(path).free / GIB
        yield judge(what, free >= 5, f"{free:.0f} GiB free", "free some, or use runs_dir=... elsewhere (5 GiB or more)",
                    "fail" if free < 1 else "warn")  # fmt: skip
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    yield judge("memory", memory.available >= 4 * GIB, found, "close something: the demo needs 4 GiB")


def processor() -> Iterator[Finding]:
    """Check the cores, and whether the processor multiplies in bf16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield judge("cores", cores >= 2, str(cores), "the jobs work on one, slowly")
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    have = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]
    found = f"{', '.join(have) or 'none'}: training takes {'bf16' if have else 'fp32'} on the CPU"
    yield Finding("bf16 in hardware", "ok", found)


def gpus() -> Iterator[Finding]:
    """Check that torch sees the GPUs that are there."""
    if not has_gpu():
        yield Finding("GPUs", "ok", "none: jobs run on the CPU")
        return
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    advice = f"torch {torch.__version__} sees none of them: check `nvidia-smi` and install the CUDA build of torch"
    yield judge("GPUs", bool(names), ", ".join(names) or "there, but not for torch", advice)


def ports() -> Iterator[Finding]:
    """Check the endpoint's port and the dashboard's."""
    cluster = state.load()
    for port, use in ((8000, "serve.port=8001"), (8265, "manta cluster up --dashboard-port 8266")):
        who = holder(port)
        ours = cluster is not None and not cluster.lost and cluster.dashboard.endswith(f":{port}")
        found = "the cluster of `manta cluster up`" if ours else f"held by {who}" if who else "free"
        yield judge(f"port {port}", ours or who is None, found, f"end that process, or use another: {use}")


def ray_left_behind() -> Iterator[Finding]:
    """Look for a dead cluster on record, and Ray processes whose parent has gone and that no cluster of ours has."""
    cluster = state.load()
    if cluster is not None and cluster.lost:
        found = f"the cluster on record has lost its {' and '.join(cluster.lost)}"
        yield Finding("cluster", "warn", found, "`manta cluster down`")
    ours = {p.pid for p in state.processes(cluster)} if cluster else set()
    stale = [
        p.info["pid"]
        for p in psutil.process_iter(["pid", "ppid", "name", "username"])
        if p.info["name"] in state.CORE and p.info["ppid"] == 1 and p.info["pid"] not in ours
    ]
    advice = "not of this `manta cluster up`: if nobody needs them, end them by these ids"
    yield judge("other Ray processes", not stale, ", ".join(f"pid {p}" for p in stale) or "none", advice)


def clock() -> Iterator[Finding]:
    """Check that the clock is not plainly wrong: certificates and checkpoints' ages go by it."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    yield judge("clock", time.time() > BUILD_DATE, now, "set it (timedatectl set-ntp true)")


def shared_memory_op() -> Iterator[Finding]:
    """Build DeepSpeed's shared-memory collective, which takes up to a minute the first time."""
    code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)"
    begun = time.monotonic()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        built, last = done.returncode == 0, (done.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        built, last = False, "not finished after 300 s: a killed build leaves a lock in ~/.cache/torch_extensions"
    found = f"built in {time.monotonic() - begun:.0f} s" if built else last
    yield judge(
        "DeepSpeed's collective", built, found, "install g++ and ninja; remove ~/.cache/torch_extensions", "fail"
    )


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python, compilers, packages, room, processor, gpus, ports, ray_left_behind, clock,
)  # fmt: skip


def examine(full: bool = False) -> list[Finding]:
    """Run all checks; `full` adds a build of DeepSpeed's collective."""
    quiet_environment()
    return [finding for check in (*CHECKS, *([shared_memory_op] if full else [])) for finding in check()]


def main(argv: list[str]) -> int:
    """Run `manta doctor`; returns 1 if something must be mended first, else 0."""
    parser = argparse.ArgumentParser(
        prog="manta doctor", description="Check this machine, and say what to do about it."
    )
    parser.add_argument("--full", action="store_true", help="build DeepSpeed's collective too (a minute)")
    findings = examine(parser.parse_args(argv).full)
    table = Table()
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for f in findings:
        table.add_row(f.what, f"[{colours[f.verdict]}]{f.verdict}[/]", f.found, f.advice)
    Console().print(table)
    return 1 if any(f.verdict == "fail" for f in findings) else 0

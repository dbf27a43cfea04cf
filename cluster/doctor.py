"""`manta doctor`: check whether this machine can run the jobs, and say how to fix what is missing."""

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
from cluster.environment import has_gpu, set_default_environment
from cluster.ports import port_holder

GIB = 2**30
BUILD_DATE = 1_767_225_600  # 2026-01-01: a clock that shows an earlier date is wrong


@dataclass(frozen=True)
class CheckResult:
    """One row of the table."""

    check: str
    status: str  # ok, warn or fail
    found: str
    advice: str = ""


def check_result(check: str, passed: bool, found: str, advice: str, status_if_not: str = "warn") -> CheckResult:
    """Return an ok result, or one with advice."""
    return CheckResult(check, "ok", found) if passed else CheckResult(check, status_if_not, found, advice)


def check_python() -> Iterator[CheckResult]:
    """Check the Python version."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield check_result("Python", fits, platform.python_version(), "use Python 3.11, 3.12 or 3.13", "fail")


def check_compilers() -> Iterator[CheckResult]:
    """Check g++, ninja and make; DeepSpeed builds its collective with the first two."""
    fixes = {
        "g++": "install it (Debian, Ubuntu: apt install g++): DeepSpeed builds its collective with it",
        "ninja": "pip install ninja: DeepSpeed builds its collective with it",
        "make": "install it (Debian, Ubuntu: apt install make): `make demo` and `make test` need it",
    }
    for program, advice in fixes.items():
        # programs of packages lie beside python, even if the environment is not activated
        path = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
        yield check_result(
            program, path is not None, path or "missing", advice, "warn" if program == "make" else "fail"
        )


def check_packages() -> Iterator[CheckResult]:
    """Check each package's version against pyproject's range."""
    wrong = []
    requirements = [Requirement(r) for r in declared_requirements()]
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    good = f"{len(requirements)} in their ranges"
    yield check_result("packages", not wrong, "; ".join(wrong) or good, "pip install -e . (or `make install`)", "fail")


def declared_requirements() -> list[str]:
    """Return the requirements without extras: of the source tree, else of the installed package."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        import tomllib

        return tomllib.loads(project.read_text())["project"]["dependencies"]
    return [r for r in importlib.metadata.requires("manta-train") or [] if "extra ==" not in r]


def check_memory_and_disk() -> Iterator[CheckResult]:
    """Check shared memory, disk and memory, in GiB."""
    try:
        free = shutil.disk_usage("/dev/shm").free / GIB
        advice = "give the container more (docker run --shm-size=4g): Ray's object store would spill to disk"
        yield check_result("shared memory", free >= 1, f"{free:.1f} GiB free", advice)
    except FileNotFoundError:
        yield CheckResult("shared memory", "ok", "no /dev/shm here: Ray uses files")
    runs = Path("runs") if Path("runs").exists() else Path.cwd()
    for what, path in (("disk for runs", runs), ("disk for temporary files", Path("/tmp"))):
        free = shutil.disk_usage(path).free / GIB
        yield check_result(what, free >= 5, f"{free:.0f} GiB free", "free some, or use runs_dir=... elsewhere (5 GiB or more)",
                    "fail" if free < 1 else "warn")  # fmt: skip
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    yield check_result("memory", memory.available >= 4 * GIB, found, "close other programs: the demo needs 4 GiB")


def check_processor() -> Iterator[CheckResult]:
    """Check the number of cores, and whether the processor has bf16 instructions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield check_result("cores", cores >= 2, str(cores), "the jobs run on one core, slowly")
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    have = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]
    found = f"{', '.join(have) or 'none'}: training takes {'bf16' if have else 'fp32'} on the CPU"
    yield CheckResult("bf16 in hardware", "ok", found)


def check_gpus() -> Iterator[CheckResult]:
    """Check that torch can use the machine's GPUs."""
    if not has_gpu():
        yield CheckResult("GPUs", "ok", "none: jobs run on the CPU")
        return
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    advice = f"torch {torch.__version__} sees none of them: check `nvidia-smi` and install the CUDA build of torch"
    yield check_result("GPUs", bool(names), ", ".join(names) or "there, but not for torch", advice)


def check_ports() -> Iterator[CheckResult]:
    """Check the ports of the endpoint and the dashboard."""
    cluster = state.load()
    for port, use in ((8000, "serve.port=8001"), (8265, "manta cluster up --dashboard-port 8266")):
        who = port_holder(port)
        ours = cluster is not None and not cluster.lost_processes and cluster.dashboard.endswith(f":{port}")
        found = "the cluster of `manta cluster up`" if ours else f"held by {who}" if who else "free"
        yield check_result(f"port {port}", ours or who is None, found, f"stop that process, or use another port: {use}")


def check_leftover_ray() -> Iterator[CheckResult]:
    """Look for a recorded cluster that has died, and for orphaned Ray processes that belong to no recorded cluster."""
    cluster = state.load()
    if cluster is not None and cluster.lost_processes:
        found = f"the recorded cluster has lost its {' and '.join(cluster.lost_processes)}"
        yield CheckResult("cluster", "warn", found, "`manta cluster down`")
    ours = {p.pid for p in state.find_processes(cluster)} if cluster else set()
    stale = [
        p.info["pid"]
        for p in psutil.process_iter(["pid", "ppid", "name", "username"])
        if p.info["name"] in state.CORE_PROCESSES and p.info["ppid"] == 1 and p.info["pid"] not in ours
    ]
    advice = "not started by `manta cluster up`: if nobody needs them, stop them by these ids"
    yield check_result("other Ray processes", not stale, ", ".join(f"pid {p}" for p in stale) or "none", advice)


def check_clock() -> Iterator[CheckResult]:
    """Check that the clock is plausible: certificates and the ages of checkpoints depend on it."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    yield check_result("clock", time.time() > BUILD_DATE, now, "set it (timedatectl set-ntp true)")


def check_shared_memory_op() -> Iterator[CheckResult]:
    """Build DeepSpeed's shared-memory collective, which takes up to a minute the first time."""
    code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)"
    start = time.monotonic()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        built, last = done.returncode == 0, (done.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        built, last = False, "not finished after 300 s: a killed build leaves a lock in ~/.cache/torch_extensions"
    found = f"built in {time.monotonic() - start:.0f} s" if built else last
    yield check_result(
        "DeepSpeed's collective", built, found, "install g++ and ninja; remove ~/.cache/torch_extensions", "fail"
    )


CHECKS: tuple[Callable[[], Iterator[CheckResult]], ...] = (
    check_python, check_compilers, check_packages, check_memory_and_disk, check_processor, check_gpus, check_ports, check_leftover_ray, check_clock,
)  # fmt: skip


def run_checks(full: bool = False) -> list[CheckResult]:
    """Run all checks; `full` adds a build of DeepSpeed's shared-memory collective."""
    set_default_environment()
    return [finding for check in (*CHECKS, *([check_shared_memory_op] if full else [])) for finding in check()]


def main(argv: list[str]) -> int:
    """Run `manta doctor`; returns 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(
        prog="manta doctor", description="Check this machine, and say what to do about it."
    )
    parser.add_argument("--full", action="store_true", help="build DeepSpeed's collective too (a minute)")
    findings = run_checks(parser.parse_args(argv).full)
    table = Table()
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    for f in findings:
        table.add_row(f.check, f"[{colors[f.status]}]{f.status}[/]", f.found, f.advice)
    Console().print(table)
    return 1 if any(f.status == "fail" for f in findings) else 0

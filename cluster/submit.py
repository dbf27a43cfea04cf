"""`manta submit JOB key=value ...`: pack the project, run a job on a cluster, follow it, end with its exit code."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import jobs, state
from cluster.environment import worker_environment
from cluster.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS = ("prepare", "pretrain", "finetune", "sweep", "evaluate", "deploy", "plan", "demo")
PATHS = (
    "data.path",
    "data.validation_path",
    "data.test_path",
    "data.tokenizer",
    "data.image_processor",
    "data.feature_extractor",
    "runs_dir",
)
NAMES_OR_PATHS = ("bundle", "evaluate.against")  # a run's name, or a folder
PATHS_IN_SOURCES = re.compile(
    r"(\b(?:validation_|test_)?path:\s*)('[^']*'|\"[^\"]*\"|[^\s,}]+)"
)  # of data.sources={...}
EXCLUDED = (
    ".git", ".venv", "venv", "runs", "outputs", "multirun", "mlruns", "tests", "build", "dist", "__pycache__",
    "*.egg-info", ".pytest_cache", ".mypy_cache", ".ruff_cache",
)  # fmt: skip


def find_source_tree(start: Path) -> Path | None:
    """Return the source tree of Manta that `start` is in, or None (Manta is then installed on the cluster)."""
    for folder in (start, *start.parents):
        project = folder / "pyproject.toml"
        if project.is_file() and tomllib.loads(project.read_text()).get("project", {}).get("name") == "manta-train":
            return folder
    return None


def make_absolute(overrides: list[str], folder: Path) -> list[str]:
    """Return the overrides with relative paths made absolute, for a job on this machine but in another folder."""
    fixed = []
    named = {"data.source=huggingface", "data=huggingface"} & {override.lstrip("+") for override in overrides}
    maybe = (*NAMES_OR_PATHS, "data.path") if named else NAMES_OR_PATHS
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.lstrip("+")
        bare = value.strip("'\"")
        is_path = (folder / bare).exists() if name in maybe else name in PATHS
        if equals and is_path and bare not in ("", "null") and "://" not in bare and not Path(bare).is_absolute():
            override = f"{key}={quote(str(folder / Path(bare).expanduser()))}"
        if name == "data.sources":
            override = f"{key}={PATHS_IN_SOURCES.sub(lambda found: found[1] + make_absolute_if_exists(found[2], folder), value)}"
        fixed.append(override)
    if not any(o.partition("=")[0].lstrip("+") == "runs_dir" for o in fixed):
        fixed.append(f"runs_dir={quote(str(folder / 'runs'))}")
    return fixed


def make_absolute_if_exists(value: str, folder: Path) -> str:
    """Return a source's path, quoted or not, made absolute if its first component exists in `folder`."""
    bare = value.strip("'\"")
    is_here = "://" not in bare and not Path(bare).is_absolute() and (folder / Path(bare).parts[0]).exists()
    return quote(str(folder / bare)) if bare and is_here else value


def quote(value: str) -> str:
    """Quote a value as Hydra's grammar requires: if it has other characters than letters, digits and a few signs."""
    if re.fullmatch(r"[\w./*?:+-]+", value):
        return value
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


def submit(client: JobSubmissionClient, job: str, overrides: list[str], folder: Path, on_this_machine: bool) -> str:
    """Submit a job with the source tree that `folder` is in; returns its id."""
    if on_this_machine:
        overrides = make_absolute(overrides, folder)
    if not any(o.startswith("cluster.address=") for o in overrides):
        overrides = [*overrides, "cluster.address=auto"]
    python = sys.executable if on_this_machine else "python"
    environment: dict[str, Any] = {"env_vars": {**worker_environment(), "PYTHONUNBUFFERED": "1"}}
    if not on_this_machine:
        environment["env_vars"].pop("DS_ACCELERATOR", None)  # its nodes may have GPUs even if this machine has none
    logging.getLogger("ray").setLevel(logging.ERROR)  # it would log what it excludes from the package
    source = find_source_tree(folder) or find_source_tree(Path(__file__).resolve().parent)
    if source:
        environment |= {"working_dir": str(source), "excludes": list(EXCLUDED)}
    return client.submit_job(
        entrypoint=shlex.join([python, "-m", f"jobs.{job}", *overrides]),
        runtime_env=environment,
        metadata={"command": shlex.join([job, *overrides])},
    )


def follow_to_end(client: JobSubmissionClient, job: str) -> int:
    """Follow a job to its end and return its exit code; Ctrl-C asks whether to detach from it or to stop it."""
    try:
        jobs.follow(client, job)
        return jobs.wait_until_ended(client, job)
    except KeyboardInterrupt:
        if sys.stdin.isatty() and ask_to_detach():
            print(f"\n{job} keeps running: manta jobs logs {job} --follow")
            return 0
        print(f"\nstopping {job}", flush=True)
        jobs.stop_job(client, job)
        return 130


def ask_to_detach() -> bool:
    """Ask whether to detach. A second Ctrl-C, or the end of the input, means stop."""
    try:
        return input("\n[d]etach and keep the job running, or [s]top it? ").strip().lower().startswith("d")
    except (KeyboardInterrupt, EOFError):
        return False


def main(argv: list[str]) -> int:
    """Run `manta submit ...`; returns the job's exit code."""
    parser = argparse.ArgumentParser(
        prog="manta submit",
        description="Run a job on a cluster, follow its log, and end with its exit code.",
        epilog="Paths among the overrides are taken from this folder, and runs are kept in ./runs, "
        "when the cluster is that of `manta cluster up`. On another, give paths that its nodes see.",
    )
    parser.add_argument("job", choices=JOBS, help="the job")
    parser.add_argument("overrides", nargs="*", help="options, as for the job itself: train.max_steps=200 name=mine")
    parser.add_argument("--address", help="dashboard of the cluster, http://host:8265 (default: the local cluster's)")
    parser.add_argument(
        "--token-path", help="file with the cluster's token (default: $RAY_AUTH_TOKEN, or the local one's)"
    )
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    options = parser.parse_intermixed_args(argv)
    for override in options.overrides:
        if "=" not in override and not override.startswith("~"):
            raise ClusterError(f"'{override}' is not of the form key=value: write for example train.max_steps=200")
    client = jobs.job_client(options.address, options.token_path)
    cluster = state.load()
    here = options.address is None or (cluster is not None and options.address.rstrip("/") == cluster.dashboard)
    job = submit(client, options.job, options.overrides, Path.cwd(), here)
    if options.no_wait:
        print(job)
        return 0
    print(f"submitted {job}", flush=True)
    return follow_to_end(client, job)

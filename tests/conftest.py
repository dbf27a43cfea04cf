"""Shared by all tests: the environment, a small real corpus, one Ray a process, and a check for leftover processes.

In a parallel run (`pytest -n 2 --dist loadfile`) the tests of a file stay in one process, so that its fixtures are made
once, and the long files start first.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.environment import set_default_environment

set_default_environment()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # the processes share the cores: threads that spin would slow the others

from engine.config import Config, with_values  # noqa: E402
from tests.browser import browser_page  # noqa: E402, F401
from tests.lives import Lives, make_lives  # noqa: E402
from tests.stores import gs, s3, s3_server  # noqa: E402, F401

TINY = {  # about 60,000 parameters
    "model.type": "llama",
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.intermediate_size": 64,
    "model.max_position_embeddings": 128,
    "model.tie_word_embeddings": True,
    "data.name": "tiny",
    "data.source": "python_stdlib",
    "data.max_documents": 40,
    "data.vocab_size": 512,
    "data.sequence_length": 32,
    "train.precision": "fp32",
    "train.global_batch": 8,
    "train.micro_batch": 2,
    "train.max_steps": 6,
    "train.checkpoint_every": 3,
    "train.evaluate_samples": 8,
    "optim.lr": 1e-2,
    "tracking.enabled": False,
}


LONG_FIRST = ("engine/serve/", "engine/sweep/", "engine/train/", "test_", "jobs/", "cluster/")  # the rest is short


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files, so that the processes of a parallel run end at about the same time."""
    root = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        name = str(item.path.relative_to(root))
        return next((i for i, prefix in enumerate(LONG_FIRST) if name.startswith(prefix)), len(LONG_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="module")
def only_local_cluster() -> Iterator[None]:
    """Let one module at a time start a cluster with `manta cluster up`: processes of a parallel run share its ports."""
    with open(Path(tempfile.gettempdir()) / "manta-tests-cluster.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def tiny(runs_dir: Path) -> Config:
    """A config of a causal model of 60,000 parameters on 40 files of the standard library."""
    return with_values(Config(), TINY | {"runs_dir": str(runs_dir)})


@pytest.fixture(scope="session")
def tiny_functions(tiny: Config) -> Config:
    """The same for naming the package of a function."""
    return with_values(
        tiny,
        {
            "data.source": "python_functions",
            "data.name": "functions",
            "data.max_documents": 400,
            "objective.name": "classification",
        },
    )


@pytest.fixture(scope="session")
def lives(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Lives:
    """Bundles with whole lineages, made once: nothing may change them (`shutil.copytree` them first)."""
    return make_lives(tiny, tmp_path_factory.mktemp("lives"))


@pytest.fixture(scope="session")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray of four cores for the session's tests."""
    from cluster.session import connect

    with connect("local", 4, False, tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail the session if a child process of it is still there at its end."""
    yield
    left = [
        p for p in psutil.Process().children(recursive=True) if "ray" in p.name() or "raylet" in " ".join(p.cmdline())
    ]
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive, f"left behind: {[p.cmdline()[:3] for p in alive]}"

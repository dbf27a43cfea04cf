"""The import rules of the house: downward only, Ray and DeepSpeed where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# package -> what it may import of the house beside itself
MAY = {
    "engine.config": {"engine.errors"},
    "engine.atomic_write": set(),
    "engine.errors": set(),
    "engine.hashing": set(),
    "engine.progress": set(),
    "engine.data": {"engine.config", "engine.atomic_write", "engine.hashing", "engine.errors"},
    "engine.models": {"engine.config", "engine.atomic_write", "engine.hashing", "engine.errors"},
    "engine.objectives": {"engine.config", "engine.errors", "engine.data", "engine.models"},
    "engine.bundles": {"engine.config", "engine.atomic_write", "engine.hashing", "engine.errors", "engine.objectives", "engine.models", "engine.data"},
    "engine.train": {"engine.config", "engine.atomic_write", "engine.hashing", "engine.errors", "engine.progress", "engine.data", "engine.models", "engine.objectives", "engine.bundles"},
    "engine.sweep": {"engine.config", "engine.atomic_write", "engine.hashing", "engine.errors", "engine.progress", "engine.data", "engine.models", "engine.objectives", "engine.plan", "engine.train"},
    "engine.evaluate": {"engine.config", "engine.atomic_write", "engine.hashing", "engine.errors", "engine.progress", "engine.data", "engine.bundles", "engine.objectives", "engine.models"},
    "engine.serve": {"engine.config", "engine.atomic_write", "engine.hashing", "engine.errors", "engine.progress", "engine.data.pii_masking", "engine.bundles", "engine.objectives", "engine.models"},
    "engine.improve": {"engine.config", "engine.errors", "engine.progress", "engine.data", "engine.bundles", "engine.objectives", "engine.train.launch", "engine.evaluate", "engine.serve.http.feedback_store"},
    "engine.plan": {"engine.config", "engine.errors", "engine.progress", "engine.models", "engine.objectives", "engine.train.hardware", "engine.train.devices", "engine.train.optimizer"},
}  # fmt: skip
RAY = {
    "engine/data/parallel_map.py",
    "engine/train/launch.py",
    "engine/train/trainer.py",
    "engine/train/elastic.py",
    "engine/train/preload.py",
    "engine/sweep/launch.py",
    "engine/sweep/rank_group.py",
    "engine/sweep/trial.py",
}
RAY_FOLDERS = ("engine/serve/", "cluster/")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_imports_go_downward() -> None:
    for path in sources("engine"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = next((room for room in MAY if module == room or module.startswith(room + ".")), None)
        for name in imports(path):
            if not name.startswith("engine.") or room is None:
                continue
            allowed = {room, *MAY[room]}
            assert any(name == a or name.startswith(a + ".") for a in allowed), f"{module} imports {name}"


def test_cluster_knows_nothing_of_the_engine() -> None:
    for path in sources("cluster"):
        assert not any(name.split(".")[0] in ("engine", "jobs") for name in imports(path)), path


def test_the_engine_knows_nothing_of_cluster_and_jobs() -> None:
    for path in sources("engine"):
        assert not any(name.split(".")[0] in ("cluster", "jobs") for name in imports(path)), path


def test_deepspeed_is_imported_in_one_module() -> None:
    using = [
        str(p.relative_to(ROOT))
        for f in ("engine", "cluster", "jobs")
        for p in sources(f)
        if any(n.split(".")[0] == "deepspeed" for n in imports(p))
    ]
    assert using == ["engine/train/zero.py"]


def test_ray_is_imported_only_where_the_cluster_is_met() -> None:
    for folder in ("engine", "jobs"):
        for path in sources(folder):
            name = str(path.relative_to(ROOT))
            if any(module.split(".")[0] == "ray" for module in imports(path)):
                assert name in RAY or name.startswith(RAY_FOLDERS), name


def test_files_are_named_after_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [p for f in ("engine", "cluster", "jobs", "tests") for p in sources(f) if p.stem in vague]

"""Processes started beforehand are the ones that actors then take."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from cluster.prestart import prestart


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("ray")
def test_actors_take_the_processes(nested: bool) -> None:
    import ray

    name = f"MANTA_TEST_{nested}"
    outer, inner = {f"{name}_OUTER": "1"}, {f"{name}_OUTER": "1", f"{name}_INNER": "1"}

    @ray.remote(num_cpus=0)
    class Actor:
        def pid(self) -> int:
            return os.getpid()

        def child_pid(self) -> int:
            child = Actor.options(runtime_env={"env_vars": {f"{name}_INNER": "1"}}).remote()  # type: ignore[attr-defined]
            return int(ray.get(child.pid.remote()))

    prestart(1, inner if nested else outer, nested)
    time.sleep(3)
    asked = time.time()
    actor = Actor.options(runtime_env={"env_vars": outer}).remote()  # type: ignore[attr-defined]
    pid = ray.get(actor.child_pid.remote() if nested else actor.pid.remote())
    assert psutil.Process(pid).create_time() < asked - 1
    ray.kill(actor)

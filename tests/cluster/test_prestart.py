"""Processes started beforehand are the ones that actors then take."""

from __future__ import annotations

import os
import time

import pytest

from cluster.prestart import prestart_workers
from tests.engine.serve.clients import processes, wait_for


def idle() -> set[int]:
    return {it.pid for it in processes("ray::IDLE")}


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

    before = idle()
    prestart_workers(1, inner if nested else outer, nested)
    wait_for(lambda: idle() - before)
    time.sleep(2)  # until the node knows it too
    waiting = idle()
    actor = Actor.options(runtime_env={"env_vars": outer}).remote()  # type: ignore[attr-defined]
    pid = ray.get(actor.child_pid.remote() if nested else actor.pid.remote())
    assert pid in waiting
    ray.kill(actor)

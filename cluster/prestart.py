"""Start Ray worker processes in advance, so that a run does not wait for each of them in turn."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping

KEEP_ALIVE_S = 120  # an unused process exits after this


def prestart_workers(
    count: int,
    env_vars: Mapping[str, str],
    nested: bool = False,
    node_id: str | None = None,
    keep_s: int = KEEP_ALIVE_S,
) -> None:
    """Have a node (this one by default) start `count` worker processes for actors with exactly these `env_vars`.

    `nested`: for actors that are created by an actor with environment variables of its own. A process that is unused
    for `keep_s` seconds exits. Ray has no public call for this, so the request goes to the node's raylet; if it fails,
    the run only starts more slowly.
    """
    with contextlib.suppress(Exception):
        import ray
        from google.protobuf import json_format
        from ray._private.grpc_utils import init_grpc_channel
        from ray._private.utils import get_runtime_env_info
        from ray.core.generated import node_manager_pb2_grpc
        from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # type: ignore[attr-defined]
        from ray.core.generated.runtime_environment_pb2 import RuntimeEnvInfo  # type: ignore[attr-defined]
        from ray.runtime_env import RuntimeEnv

        here = ray.get_runtime_context()
        node = next(n for n in ray.nodes() if n["NodeID"] == (node_id or here.get_node_id()))
        environment = get_runtime_env_info(RuntimeEnv(env_vars=dict(env_vars)), serialize=True)
        info = json_format.Parse(environment, RuntimeEnvInfo())
        if (
            nested
        ):  # Ray compares environments as text, and serializes one that it merged with the parent's without spaces
            merged = json.loads(info.serialized_runtime_env)
            info.serialized_runtime_env = json.dumps(merged, separators=(",", ":"), sort_keys=True)
        request = PrestartWorkersRequest(
            job_id=bytes.fromhex(here.get_job_id()),
            num_workers=count,
            keep_alive_duration_secs=keep_s,
            runtime_env_info=info,
        )
        with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=5)

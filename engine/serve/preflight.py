"""Checks before a deployment: bundles, port and resources. Each raises UserError, before anything is started."""

from __future__ import annotations

import contextlib

import psutil

from engine.bundles.bundle import Bundle
from engine.config import ServeConfig
from engine.errors import UserError
from engine.serve.llm.lora import check_adapters
from engine.serve.llm.vllm_engine import check_vllm_python
from engine.serve.routing.messages import EndpointState


def check_servable(bundle: Bundle, options: ServeConfig) -> None:
    """Raise UserError for a bundle that was changed, is for a task that the endpoint doesn't offer, or not for these options."""
    bundle.verify()
    objective = bundle.objective()
    if not objective.servable:
        raise UserError(
            f"{bundle.folder} is for {objective.options.name}, which the endpoint doesn't offer: load it with transformers, or "
            "measure it with manta evaluate"
        )
    generates_text = objective.is_causal
    if options.compile and not generates_text:
        raise UserError(
            f"serve.compile is for bundles that generate text, and {bundle.folder} is for {objective.options.name}"
        )
    if options.quantize != "none" and objective.kind.has_preprocessor:
        raise UserError(
            f"serve.quantize is for bundles that read or generate text, and {bundle.folder} is for {objective.options.name}"
        )
    if options.generator == "vllm":
        if not generates_text:
            raise UserError(
                f"serve.generator=vllm is for bundles that generate text, and {bundle.folder} is for "
                f"{objective.options.name}: deploy it without"
            )
        check_vllm_python(options)
    check_adapters(bundle, options.adapters)
    if options.draft_model:
        from engine.serve.llm.speculative import check_draft_model  # imports torch's compiler: two seconds

        check_draft_model(bundle, options.draft_model)


def check_port_is_free(port: int) -> None:
    """Raise UserError for a port in use, with the process that holds it and the next free port."""
    listeners = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    if port in listeners:
        free_port = next(other for other in range(port + 1, 65536) if other not in listeners)
        pid = listeners[port]
        holder = "another user's process"
        with contextlib.suppress(psutil.Error):  # it may have ended since
            holder = f"{psutil.Process(pid).name()}, process {pid}" if pid else holder
        raise UserError(f"serve.port {port} is in use by {holder}: use serve.port={free_port}")


def check_ingress_options_unchanged(options: ServeConfig, endpoint: EndpointState) -> None:
    """Raise UserError where options differ that HAProxy, or its absence, was started with."""
    present = endpoint.settings.get("options", {})
    for name in ("haproxy", "ingresses", *(["body_timeout_s"] if options.haproxy else [])):
        value = present.get(name, getattr(ServeConfig(), name))
        if value != getattr(options, name):
            raise UserError(
                f"the endpoint at {endpoint.url} has serve.{name}={str(value).lower()}, which can't change while it is up: use "
                "the same, or take it down first"
            )


def check_capacity(options: ServeConfig, num_versions: int, beside_others: bool) -> None:
    """Raise UserError where new versions need more than the cluster has; Serve would wait forever.

    `beside_others`: other versions are served, and go on until the new ones are ready, so only free resources count.
    """
    import ray

    resources = ray.available_resources() if beside_others else ray.cluster_resources()
    num_replicas = num_versions * max(options.min_replicas, 1)
    for kind, per_replica, key in (
        ("cores", options.cpus_per_replica, "CPU"),
        ("GPUs", options.gpus_per_replica, "GPU"),
    ):
        if per_replica * num_replicas > resources.get(key, 0.0) + 1e-6:
            left = " left beside the present versions" if beside_others else ""
            raise UserError(
                f"{num_replicas} replicas x {per_replica:g} {kind} are needed, the cluster has {resources.get(key, 0.0):g} {kind}"
                f"{left}: use fewer serve.min_replicas or a smaller serve.{key.lower()}s_per_replica"
            )

"""Messages between the routers of the ingresses, the rollout controller and `manta deploy`.

They cross processes, pickled by Ray. What is stored or printed as JSON (`RolloutEvent`) keeps its field names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.serve.jobs import ModelInfo
from engine.serve.routing.sequential_test import Outcome


@dataclass(frozen=True)
class Version:
    """A bundle with the options that it is served with. Another bundle or another option is another version."""

    id: str
    app: str  # name of the Serve application that holds its replicas
    hash: str  # of the bundle
    folder: str
    options: dict[str, Any]  # ServeConfig
    info: ModelInfo | None = None  # None until a replica was asked


@dataclass(frozen=True)
class RolloutEvent:
    """Something that happened to a version; a line of rollout.jsonl."""

    time: float  # seconds since 1970
    model: str
    event: str  # canary, shadow, compared, promoted, unchanged or withdrawn
    version: str
    bundle: str  # its hash
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A version that is rolled out, as routers see it."""

    version: Version
    traffic_share: float  # of the requests, which it answers
    shadow_share: float  # of the requests, copied to it


@dataclass(frozen=True)
class ModelRoute:
    """Which versions answer the requests for a model."""

    stable: Version
    candidate: Candidate | None
    events: list[RolloutEvent]

    @property
    def versions(self) -> list[Version]:
        """All versions that may be asked."""
        return [self.stable, *([self.candidate.version] if self.candidate else [])]


@dataclass(frozen=True)
class RoutingTable:
    """What all routers follow."""

    revision: int  # grows with each change
    models: dict[str, ModelRoute]
    settings: dict[str, Any]  # the ingress' {"options", "access"}; empty until an ingress was deployed


@dataclass(frozen=True)
class ShadowComparison:
    """A shadow's answer to a copied request, compared with the stable version's."""

    failed: bool = True  # the shadow
    identical: bool | None = None  # whether all texts are the same; None: cannot be compared
    max_difference: float | None = None  # of a number in the answers; None: cannot be compared
    stable_latency_s: float = 0.0  # as Outcome.latency_s
    shadow_latency_s: float = 0.0


@dataclass
class Report:
    """What a router has seen since its last report; keys are ids of versions."""

    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    comparisons: dict[str, list[ShadowComparison]] = field(default_factory=dict)
    ratings: dict[str, list[bool]] = field(default_factory=dict)  # True: bad


@dataclass(frozen=True)
class EndpointState:
    """Where the endpoint listens, and how it was deployed."""

    url: str
    folder: str  # of the run that changed it last
    settings: dict[str, Any] = field(default_factory=dict)  # the ingress' {"options", "access"}
    declared: dict[str, str] = field(default_factory=dict)  # model -> version that a Serve config file names

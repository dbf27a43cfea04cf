"""How many replicas a version needs, by the work in flight: tokens queued and running, and requests.

Serve sends this module's code to its controller, which calls the policy at every look.
"""

from __future__ import annotations

from typing import Any

# What a replica tells: tokens still to be read and written by all that it has taken, and requests by lanes, unknown to Serve.
TOKENS, REQUESTS = "tokens_in_flight", "requests_by_lanes"


def ongoing(max_num_seqs: int) -> int:
    """Return how many requests a replica takes at once: those of a forward, and some to go on with."""
    return 4 * max_num_seqs


def wanted(tokens: float, requests: float, queued: float, target_tokens: int, target_requests: int) -> float:
    """Return how many replicas the work is for: by tokens or by requests, whichever asks for more.

    `tokens` are those of the requests that replicas have taken; `requests` are all, of which `queued` wait for a replica
    and are taken to be as long as the others.
    """
    taken = max(requests - queued, 0.0)
    share = requests / taken if taken else 1.0
    return max(tokens * share / target_tokens, requests / target_requests)


class WorkInFlight:
    """A policy of Serve's autoscaler; Serve applies bounds and delays to what it says."""

    def __init__(self, target_tokens: int, target_requests: int) -> None:
        """Take what one replica is meant to have in flight, in tokens and in requests."""
        self.target_tokens, self.target_requests = target_tokens, target_requests

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas, and no state of its own."""
        told = context.aggregated_metrics or {}
        tokens, by_lanes = (sum(told.get(kind, {}).values()) for kind in (TOKENS, REQUESTS))
        requests, queued = context.total_num_requests + by_lanes, context.total_queued_requests or 0.0
        return wanted(tokens, requests, queued, self.target_tokens, self.target_requests), {}

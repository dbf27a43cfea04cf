"""Which version answers a request, on which replica: routing, rollouts, autoscaling."""

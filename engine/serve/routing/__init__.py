"""Which version answers a request, on which replica: routing, roll-outs, autoscaling."""

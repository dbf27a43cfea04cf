"""Bundles behind an HTTP endpoint, on Ray Serve."""

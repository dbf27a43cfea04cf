"""Metrics on held-out data, with intervals; comparison of two bundles; the report of a model's life."""

"""Serves bundles over HTTP with Ray Serve."""

"""Bundles (the model folders that training exports and serving loads), their registry and lineage."""

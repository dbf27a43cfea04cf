"""Manta's library: from raw data to a live endpoint."""

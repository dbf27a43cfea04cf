"""Benchmarks against peers; `make bench` runs each file."""

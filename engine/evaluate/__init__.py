"""Metrics on held-out data with confidence intervals, comparison of bundles, promotion, and HTML reports."""

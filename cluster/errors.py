"""The one exception of this package for a mistake that the user can fix."""

from __future__ import annotations


class ClusterError(Exception):
    """One clear sentence that says what is wrong and what to do; a command ends with it and exit code 2."""

"""Where a job runs: a Ray of its own, a cluster on this machine, or one elsewhere. Knows Ray and machines, no models."""

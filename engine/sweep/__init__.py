"""Search spaces from the config, through Ray Tune, to the best bundle."""

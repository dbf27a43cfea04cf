"""The step loop and what it stands on."""

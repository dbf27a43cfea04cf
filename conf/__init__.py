"""Config files of jobs; each YAML states only what differs from the defaults in engine/config/."""

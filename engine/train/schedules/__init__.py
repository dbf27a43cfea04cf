"""Learning-rate schedules: a file `<schedule.kind>.py` each, with `decay(progress, options)`, found by listing the folder."""

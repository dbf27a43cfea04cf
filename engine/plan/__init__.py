"""What a job needs before it takes anything."""

"""Who does the work, and what survives when it dies."""

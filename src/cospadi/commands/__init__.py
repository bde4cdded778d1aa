"""What the command line does that is more than one call."""

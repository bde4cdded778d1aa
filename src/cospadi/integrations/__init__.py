"""Where other libraries meet the checkpoint format."""

"""Where other libraries meet the checkpoint format and the layers."""

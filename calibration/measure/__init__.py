"""What rounds cost on this machine, and what the target accepts."""

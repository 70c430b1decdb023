"""Checkpoints for the servers people run, one target a file."""

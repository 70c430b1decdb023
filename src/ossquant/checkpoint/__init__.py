"""Safetensors checkpoints as streams: read by header, written header first."""

"""Measure a model: in this process, or behind an OpenAI-compatible server."""

"""Measure a model. This first form knows one target: a model in this process."""

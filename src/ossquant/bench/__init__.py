"""Measure a model. This first form knows one target: a model in this process."""

import ossquant.runtime  # noqa: F401  says which extra is missing

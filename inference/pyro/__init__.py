"""Sampling, loading and data for the torch twin of `hilbertcell.models.pyro` (extra `torch`)."""

import hilbertcell.models.pyro  # noqa: F401 - says what is missing where torch is

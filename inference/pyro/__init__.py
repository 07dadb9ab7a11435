"""Inference of the programs in Pyro, exchange of fits and draws with NumPyro, and the torch samplers, loader and data set."""

import hilbertcell.models.pyro  # noqa: F401 - says what is missing where the extra is

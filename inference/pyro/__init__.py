"""Inference of the programs in Pyro, and the exchange of fits and draws with NumPyro."""

import hilbertcell.models.pyro  # noqa: F401 - says what to install where torch or Pyro is absent

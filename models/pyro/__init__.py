"""The programs and the denoisers in Pyro and torch (extra `torch`): same sites, priors, plates, names and laws.

Importing it without the extra raises ImportError with the cure.
"""

try:
    import pyro  # noqa: F401
    import torch  # noqa: F401
except ImportError:
    raise ImportError(
        "hilbertcell.models.pyro and hilbertcell.inference.pyro need PyTorch and Pyro: pip install 'hilbertcell[torch]'"
    ) from None

"""The programs in Pyro, for users of torch: the same sites, priors, plates and names as in NumPyro.

Importing it without the extra raises ImportError with the cure.
"""

from importlib.util import find_spec

if find_spec("torch") is None or find_spec("pyro") is None:
    raise ImportError("hilbertcell.models.pyro needs torch and Pyro: pip install 'hilbertcell[torch]'")

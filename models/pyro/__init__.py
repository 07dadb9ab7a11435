"""The programs and denoisers in torch and Pyro: the same names and laws, for use in pipelines of theirs (extra `torch`)."""

try:
    import torch  # noqa: F401
except ImportError:
    raise ImportError(
        "hilbertcell.models.pyro and hilbertcell.inference.pyro need PyTorch: pip install 'hilbertcell[torch]'"
    ) from None

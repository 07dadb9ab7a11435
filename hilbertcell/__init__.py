"""Probabilistic programs for how cell populations respond to perturbations."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("hilbertcell")
__all__ = ["Fit", "fit", "load_fit", "read_populations", "report", "simulate"]

# Names are looked up on first use, so that `hilbertcell --help` imports neither jax nor arviz nor anndata.
_HOMES = {
    "Fit": "hilbertcell.inference.fit",
    "fit": "hilbertcell.inference.fit",
    "load_fit": "hilbertcell.inference.fit",
    "read_populations": "hilbertcell.data.anndata_io",
    "report": "hilbertcell.analyses.report",
    "simulate": "hilbertcell.analyses.simulated",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'hilbertcell' has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

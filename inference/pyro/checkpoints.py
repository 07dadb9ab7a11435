"""The trained denoiser of a stored fit as a torch module."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from hilbertcell.inference.checkpoints import incomplete, read_manifest
from hilbertcell.models.pyro.denoisers import ResidualDenoiser

_PREFIX = "diffusion.denoiser."


def load_denoiser(path: Path | str) -> ResidualDenoiser:
    """Read the denoiser of the fit in the folder `path`, float32 and on the CPU; weights need gradients, as torch's do.

    Raises:
        ValueError: the folder is not a fit of this version, is damaged, or its response law is not the diffusion.
    """
    path = Path(path)
    law = read_manifest(path)["law"]
    if law["name"] != "diffusion":
        raise ValueError(
            f"{path} holds no denoiser: its response law is {law['name']} ({law['reason']}); fit with --law diffusion"
        )
    try:
        with safe_open(path / "arrays.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(_PREFIX)]  # noqa: SIM118 - no mapping
            state = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in names}
        return ResidualDenoiser.from_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise incomplete(path, error) from None

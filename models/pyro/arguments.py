"""Arguments of the programs as tensors: the arrays that NumPyro's programs take, on a torch device."""

from typing import Any

import jax
import numpy as np
import torch


def as_tensors[T](arguments: T, device: str | torch.device = "cpu") -> T:
    """The same structure with every array a tensor on `device`; real numbers in float64, the dtype of the twin.

    Tuples, named tuples (`Globals`, `Observations`) and dicts keep their form; plain Python numbers and None stay
    what they are; tensors are moved.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, bool | int | float | str):
            return value
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        return tensor.to(device, torch.float64 if tensor.is_floating_point() else None)

    return jax.tree.map(leaf, arguments)

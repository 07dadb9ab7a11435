"""Published torch checkpoints, read without running anything of them, and written again."""

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hilbertcell.inference.perturbdiff.stand_ins import ALLOWED, plain, safe_globals
from hilbertcell.inference.perturbdiff.torch_archive import CheckpointError, check_archive

State = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class TorchCheckpoint:
    """What is kept of a checkpoint.

    Attributes:
        state: official names to arrays; the averaged weights where training averaged.
        current: the weights that were not averaged, or None where training did not average.
        settings: `hyper_parameters` as plain values, by entry.

    """

    state: State
    current: State | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def labels(self, kind: str) -> dict[str, int] | None:
        """A map from labels to ids: `kind` is "pert", "cell_type" or "batch"; None where there is none.

        Raises:
            CheckpointError: if it does not map labels to distinct ids from 0 on.
        """
        found = self.settings.get("cov_encoding_cfg", {})
        found = found.get(f"{kind}_dict") if isinstance(found, dict) else None
        if found is None:
            return None
        if (
            not isinstance(found, dict)
            or not all(type(i) is int for i in found.values())
            or sorted(found.values()) != list(range(len(found)))
        ):
            raise CheckpointError(f"cov_encoding_cfg.{kind}_dict does not number its labels 0, 1, ...")
        return {str(label): int(i) for label, i in found.items()}


def read_checkpoint(path: Path) -> TorchCheckpoint:
    """Read a checkpoint as the published training writes it, or a bare state dict.

    Raises:
        CheckpointError: the file is not what `torch_archive.check_archive` lets pass, or does not hold arrays
            under names. Whether they fit a network is for `from_state_dict` to say.
    """
    torch = import_torch()
    check_archive(path, ALLOWED)
    try:
        with torch.serialization.safe_globals(safe_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - what torch raises depends on what is broken; it ran nothing
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: torch cannot load it ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a checkpoint")
    if "state_dict" not in content:
        return TorchCheckpoint(_arrays(content, path, torch))
    current = content.get("current_model_state")
    settings = content.get("hyper_parameters", {})
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: hyper_parameters hold a {type(settings).__name__}, expected a mapping"
        )
    try:
        settings = plain(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return TorchCheckpoint(
        _arrays(content["state_dict"], path, torch),
        None if current is None else _arrays(current, path, torch),
        settings,
    )


def write_checkpoint(checkpoint: TorchCheckpoint, path: Path) -> None:
    """Write a checkpoint that torch loads, names and numbers as they were read; settings become plain values."""
    torch = import_torch()

    def tensors(state: State) -> dict[str, Any]:
        return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}

    content: dict[str, Any] = {"state_dict": tensors(checkpoint.state)}
    if checkpoint.current is not None:
        content["current_model_state"] = tensors(checkpoint.current)
    torch.save(content | {"hyper_parameters": checkpoint.settings}, path)


def import_torch() -> Any:
    """The module. Raises: ImportError that says how to get it."""
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            "reading and writing torch checkpoints needs torch: pip install 'hilbertcell[torch]'"
        )
    return importlib.import_module("torch")


def _arrays(state: Any, path: Path, torch: Any) -> State:
    """Copies of all tensors of a mapping, or a list of what is not one."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path}: its state_dict does not map names to arrays")
    problems = []
    for name, tensor in state.items():
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            problems.append(f"{name}: {type(tensor).__name__}, expected a dense tensor")
        elif (
            not tensor.is_contiguous() or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes()
        ):
            problems.append(f"{name}: shape {tuple(tensor.shape)} is more than its storage holds")
        elif tensor.dtype not in (torch.float32, torch.int32, torch.int64):
            problems.append(f"{name}: {tensor.dtype}, expected torch.float32 or an integer type")
    if problems:
        raise CheckpointError(f"{path}: these arrays cannot be used:\n  " + "\n  ".join(problems))
    return {name: tensor.numpy().copy() for name, tensor in state.items()}

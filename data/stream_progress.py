"""How far a streaming pass has come, in a file: what an interrupted pass goes on from."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hilbertcell.data.grouping import labels_to_json
from hilbertcell.data.matrices import FilePart
from hilbertcell.data.population_sums import PopulationSums
from hilbertcell.data.populations import Populations

FORMAT = "hilbertcell streaming 1"
SAVE_SECONDS = (
    30.0  # between two savings: the sums of many populations take as long to write as a block to read
)


@dataclass(frozen=True)
class StreamProgress:
    """The file `path` for the pass that `key` stands for."""

    path: Path
    key: str

    def load(self, total: PopulationSums) -> int:
        """How many blocks of this pass are done, 0 if none is; puts their sums into `total`.

        Raises: ValueError if the file is none of a streaming pass. That of another pass is left aside.
        """
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="numpy") as file:
                found = file.metadata() or {}
                if found.get("format") == FORMAT and found["key"] == self.key:
                    for name, array in total.arrays.items():
                        array[...] = file.get_tensor(name)
                    return int(found["done"])
        except (OSError, SafetensorError):
            found = {}
        if found.get("format") != FORMAT:
            raise ValueError(
                f"resume = {str(self.path)!r}: is not the file of a streaming pass; name another"
            )
        return 0

    def save(self, total: PopulationSums, done: int) -> None:
        """Replace the file by the sums after `done` blocks; it is whole at any moment."""
        beside = self.path.with_name(f"{self.path.name}.new")
        save_file(total.arrays, beside, metadata={"format": FORMAT, "key": self.key, "done": str(done)})
        os.replace(beside, self.path)

    def remove(self) -> None:
        """The pass is complete."""
        self.path.unlink(missing_ok=True)


def stream_key(
    populations: Populations,
    feature_map: Any,
    arrays: Sequence[np.ndarray],
    bounds: Sequence[tuple[int, int]],
) -> str:
    """A hash of all that the sums of a pass depend on; of the files it takes name, size and time.

    Raises: ValueError for cells in memory, and for a feature map without `to_arrays()`.
    """
    matrix = populations.matrix
    files = [part for part in matrix.parts if isinstance(part, FilePart)]
    if len(files) < len(matrix.parts):
        raise ValueError("resume is for files, these cells are in memory: leave resume out")
    if not hasattr(feature_map, "to_arrays"):
        raise ValueError(
            f"resume needs a feature map with to_arrays(), got {feature_map!r}: leave resume out"
        )
    digest = hashlib.blake2b(digest_size=16)
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in (part.path.stat() for part in files)]
    for text in (labels_to_json(populations.labels), repr((populations.keys, files, stats, list(bounds)))):
        digest.update(text.encode())
    library = populations.library_size
    for array in (
        populations.cell_population,
        np.zeros(0) if library is None else library,
        *(np.zeros(0) if columns is None else columns for columns in matrix.columns),
        *(array for _, array in sorted(feature_map.to_arrays().items())),
        *arrays,
    ):
        digest.update(repr((array.dtype, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

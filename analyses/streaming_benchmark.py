"""Streaming against merely reading: `python -m hilbertcell.analyses.streaming_benchmark` (`make bench-streaming`).

Simulated cells are written block by block, never all in memory, in several storages. In a process of its own for each
storage, passes of `stream_moments` alternate with passes that read and decompress the same blocks and do nothing
else: other work on the machine then slows both alike. Writes docs/_parts/streaming.md and .json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem, write_elem
from rich.console import Console
from safetensors.numpy import load_file, save_file

from hilbertcell.analyses.first_benchmarks import markdown
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.moments import BLOCK_BYTES, Moments, stream_moments
from hilbertcell.data.populations import Populations
from hilbertcell.data.scan import scan_matrix
from hilbertcell.data.stores import Node, open_store
from hilbertcell.inference.settings import Settings
from hilbertcell.models.feature_maps import FeatureMap, fit_feature_map
from hilbertcell.models.simulator import (
    SimulatorSettings,
    cells,
    draw_environments,
    draw_world,
    generator,
    populations,
)
from hilbertcell.models.within_covariance import fit_loadings

# 1,008 populations of 2,000 genes, 140 counts per cell: one entry in twenty is not zero.
WORLD = SimulatorSettings(
    contexts=("B", "T", "NK", "monocyte"),
    perturbations=tuple(f"drug-{i:02d}" for i in range(1, 21)),
    inert=(),
    combinations=(),
    num_batches=12,
    num_genes=2000,
    library_size=140.0,
)
KEYS: dict[str, Any] = {
    "perturbation": "perturbation",
    "control": "control",
    "context": "cell_type",
    "batch": "donor",
}
NUM_PILOT = 5_000
STORAGES = ("gzip.h5ad", "plain.h5ad", "zstd.zarr")
WORKERS = {"gzip.h5ad": (1, 2)}  # processes, where not one only


def simulated_blocks(
    num_cells: int, settings: SimulatorSettings = WORLD, seed: int = 0, size: int = 20_000
) -> Iterator[tuple[sp.csr_array, pd.DataFrame]]:
    """Blocks of counts (float32 CSR) and labels of cells of random populations, one block in memory at a time."""
    keys = jax.random.split(jax.random.key(seed), 3)
    world = draw_world(keys[0], settings)
    environments = draw_environments(keys[1], settings, settings.num_batches)
    shape = len(settings.contexts), len(settings.labels), settings.num_batches
    codes = np.unravel_index(np.arange(np.prod(shape)), shape)
    rates = jax.device_get(populations(settings, world, environments, *codes))
    rng = generator(keys[2])
    for first in range(0, num_cells, size):
        of = np.sort(rng.integers(0, len(codes[0]), min(size, num_cells - first)))
        emitted = [
            sp.csr_array(cells(rng, settings, world, rates, p, n)[0].astype(np.float32))
            for p, n in zip(*np.unique(of, return_counts=True), strict=True)
        ]
        order = rng.permutation(len(of))
        c, t, b = (code[of[order]] for code in codes)
        names = (
            ("cell_type", settings.contexts, c),
            ("perturbation", settings.labels, t),
            ("donor", settings.batches, b),
        )
        obs = pd.DataFrame({name: pd.Categorical.from_codes(k, values) for name, values, k in names})
        obs.index = pd.Index([f"cell{first + i:07d}" for i in range(len(of))], dtype=str)
        yield sp.csr_array(sp.vstack(emitted, format="csr")[order]), obs


def write_cells(
    path: Path, num_cells: int, num_genes: int, blocks: Iterator[tuple[sp.csr_array, pd.DataFrame]]
) -> None:
    """Write blocks of CSR rows to a new h5ad file, compressed as `AnnData.write_h5ad(compression="gzip")` does."""
    obs, pointers = [], [np.zeros(1, np.int64)]
    size = (
        num_cells * num_genes // 16
    )  # for a start: the chunks are chosen by it, as for a matrix written whole
    with h5py.File(path, "w") as file:
        X = _matrix_group(file, num_cells, num_genes)
        for name, dtype in (("data", np.float32), ("indices", np.int32)):
            X.create_dataset(name, (size,), dtype, maxshape=(None,), compression="gzip")
        for rows, labels in blocks:
            start = pointers[-1][-1]
            stop = start + rows.nnz
            for name, values in (("data", rows.data), ("indices", rows.indices)):
                X[name].resize((max(stop, X[name].shape[0]),))
                X[name][start:stop] = values
            pointers.append(start + rows.indptr[1:].astype(np.int64))
            obs.append(labels)
        for name in ("data", "indices"):
            X[name].resize((pointers[-1][-1],))
        X["indptr"] = np.concatenate(pointers)
        write_elem(file, "obs", pd.concat(obs))
        genes = pd.Index([f"gene{g + 1:04d}" for g in range(num_genes)], dtype=str)
        write_elem(file, "var", pd.DataFrame(index=genes))


def copy_cells(source: Path, target: Path) -> None:
    """The same cells in another storage: what the name of the target says, with the chunks its library chooses."""
    compression = target.name.partition(".")[0]
    with open_store(source) as old:
        matrix = old["X"]
        new: Node = zarr.open_group(target, mode="w") if target.suffix == ".zarr" else h5py.File(target, "w")
        X = _matrix_group(new, *(int(n) for n in matrix.attrs["shape"]))
        for name in ("data", "indices", "indptr"):
            array = matrix[name]
            if target.suffix == ".zarr":
                with warnings.catch_warnings():  # that automatic shards, which AnnData writes, may change
                    warnings.simplefilter("ignore")
                    copy = X.create_array(name, shape=array.shape, dtype=array.dtype, shards="auto")
                step = copy.shards[0]
            else:
                kind = {} if compression == "plain" else {"compression": compression}
                copy, step = X.create_dataset(name, array.shape, array.dtype, maxshape=(None,), **kind), 2**22
            for start in range(0, array.shape[0], step):
                copy[start : start + step] = array[start : start + step]
        for name in ("obs", "var"):
            write_elem(new, name, read_elem(old[name]))
        if target.suffix != ".zarr":
            new.close()


def _matrix_group(store: Node, num_cells: int, num_genes: int) -> Node:
    store.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    X = store.create_group("X")
    X.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (num_cells, num_genes)}
    )
    return X


def read_only(path: Path, bounds: tuple[int, int]) -> int:
    """Read and decompress the stored arrays of rows start <= i < stop, and do nothing else; how many bytes."""
    with open_store(path) as store:
        X = store["X"]
        first, last = (int(X["indptr"][row]) for row in bounds)
        pointers = X["indptr"][bounds[0] : bounds[1] + 1]
        data, indices = X["data"][first:last], X["indices"][first:last]
    return data.nbytes + indices.nbytes + pointers.nbytes


def prepare(path: Path, out: Path) -> None:
    """The feature map and the loadings of a fit with default settings, from 5,000 pilot cells, as safetensors."""
    chosen = Settings()
    pilot, codes = read_populations(path, **KEYS).pilot(NUM_PILOT)
    feature_map = fit_feature_map(pilot, chosen.num_components, chosen.num_random_features)
    loadings, center = fit_loadings(feature_map(pilot), codes, chosen.noise_rank)
    arrays = feature_map.to_arrays() | {"loadings": loadings, "scores_center": center}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, out)


def stream(
    populations: Populations, prepared: Path, workers: int = 1, chunk_size: int | None = None
) -> Moments:
    """`stream_moments` with what `prepare` wrote."""
    arrays = load_file(prepared)
    feature_map = FeatureMap.from_arrays(arrays)
    return stream_moments(
        populations, feature_map, arrays["loadings"], arrays["scores_center"], chunk_size, workers=workers
    )


def measure(path: Path, prepared: Path, workers: int, repeats: int) -> dict[str, Any]:
    """Seconds on the clock of each pass of each kind, in turn, and the peak memory of this process and its workers."""
    start = time.perf_counter()
    found = read_populations(path, **KEYS)
    door = time.perf_counter() - start
    matrix, bounds = found.matrix, found.matrix.partition(None, BLOCK_BYTES)
    kinds: dict[str, Callable[[], object]] = {
        "read": lambda: [read_only(path, rows) for rows in bounds],
        "stream": lambda: stream(found, prepared, workers),
    }
    if workers == 1 and path.name == STORAGES[0]:
        kinds["check"] = lambda: scan_matrix(matrix)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    processor: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, function in kinds.items():
            start, used = time.perf_counter(), processor_seconds()
            function()
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(processor_seconds() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if workers > 1:
        peak += workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "cells": found.num_cells,
        "populations": len(found.labels),
        "blocks": len(bounds),
        "seconds": seconds,
        "processor_seconds": processor,
        "read_populations": door,
        "peak_bytes": peak * 1024,
    }


def processor_seconds() -> float:
    """Seconds of processor time that this process, its threads and the children that have ended took."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in used)


def in_child(*arguments: object) -> str:
    """Standard output of this module run with `arguments` in a process of its own."""
    # Not with -m: processes that it spawns in turn would import this module, and jax with it, as their main one.
    code = "from hilbertcell.analyses.streaming_benchmark import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ratios(result: dict[str, Any], kind: str, clock: str = "seconds") -> np.ndarray:
    """Speed of each pass of that kind over the speed of the reading pass of the same round."""
    return np.array(result[clock]["read"]) / np.array(result[clock][kind])


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per storage and number of processes."""
    rows = {}
    for name, result in results.items():
        row = {}
        for kind in ("read", "stream"):
            row[f"{kind}, cells/s"] = f"{result['cells'] / np.median(result['seconds'][kind]):,.0f}"
        for kind, head in (("stream", "stream / read"), ("check", "check / read")):
            row[head] = "-"
            if kind in result["seconds"]:
                found = ratios(result, kind)
                row[head] = f"{np.median(found):.2f} ({found.min():.2f} to {found.max():.2f})"
        found = ratios(result, "stream", "processor_seconds")
        row["the same in processor time"] = f"{np.median(found):.2f}"
        row["peak memory, GB"] = f"{result['peak_bytes'] / 1e9:.2f}"
        rows[name] = row
    return markdown(pd.DataFrame(rows).T).replace("| model |", "| storage |", 1)


def run(num_cells: int, folder: Path, repeats: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Make the files that are not there yet, and measure each storage; results as JSON can hold them."""
    first, prepared = folder / STORAGES[0], folder / "prepared.safetensors"
    if not first.exists():
        log(f"simulating {num_cells:,} cells")
        write_cells(first, num_cells, WORLD.num_genes, simulated_blocks(num_cells))
    for name in STORAGES[1:]:
        if not (folder / name).exists():
            log(f"copying to {name}")
            copy_cells(first, folder / name)
    log("choosing the feature map")
    in_child("--prepare", prepared, "--folder", folder)
    results = {}
    for name in STORAGES:
        for workers in WORKERS.get(name, (1,)):
            log(f"{name}, {workers}")
            label = name if workers == 1 else f"{name}, {workers} processes"
            found = in_child(
                "--measure", name, "--folder", folder, "--workers", workers, "--repeats", repeats
            )
            results[label] = json.loads(found) | {"bytes": _size(folder / name)}
    with h5py.File(first) as file:
        entries = file["X/data"].shape[0]
    density = entries / (num_cells * WORLD.num_genes)
    return {"density": density, "num_genes": WORLD.num_genes, "storages": results}


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def page(result: dict[str, Any]) -> str:
    """The part of docs/benchmarks.md."""
    one = result["storages"][STORAGES[0]]
    sizes = ", ".join(
        f"{name} {found['bytes'] / 1e6:,.0f} MB"
        for name, found in result["storages"].items()
        if "processes" not in name
    )
    return (
        f"{one['cells']:,} simulated cells of {one['populations']:,} populations in random order, {result['num_genes']:,} "
        f"genes, {result['density']:.1%} of the entries not zero, int32 indices, chunks as AnnData writes them ({sizes}); "
        f"the feature map of a fit with default settings. {len(one['seconds']['read'])} passes of each kind in turn, "
        f"{one['blocks']} blocks; speeds are medians, ratios medians and range. 'read' reads and decompresses the arrays of the same "
        "blocks and does nothing else, in one thread; streaming with one process sums up blocks in as many threads as there are "
        "cores, at most four, which takes no processor time off it; 'check' is the pass of `read_populations`, which took "
        f"{one['read_populations']:.0f} s in all for {STORAGES[0]}. Memory is the peak of a process that read and streamed; that of "
        f"several is added up. {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f} at the end of it, {time.strftime('%Y-%m-%d')}.\n\n{table(result['storages'])}"
    )


def main() -> None:
    """Run the benchmark; print the part of docs/benchmarks.md and write it."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.streaming_benchmark", description=__doc__)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the parts")
    parser.add_argument(
        "--folder", type=Path, help="folder of the cells, kept and used again; else a temporary one"
    )
    for name in ("--prepare", "--measure"):  # what a child does
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(options.folder / STORAGES[0], Path(options.prepare))
        return
    if options.measure:
        prepared = options.folder / "prepared.safetensors"
        print(
            json.dumps(measure(options.folder / options.measure, prepared, options.workers, options.repeats))
        )
        return
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(options.cells, folder, options.repeats, console.print)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "streaming.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    text = page(result)
    (options.out / "streaming.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

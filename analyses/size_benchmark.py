"""Time and memory of a fit and its predictions at 2,000 populations x 2,000 genes, each step in a process of its own.

`python -m hilbertcell.analyses.size_benchmark` simulates the cells, fits them, predicts all populations of as many new
batches, and writes `docs/_parts/size.md`.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from hilbertcell.analyses.first_benchmarks import markdown

NUM_GENES = 2000
KEYS: dict[str, Any] = {
    "perturbation": "perturbation",
    "control": "control",
    "context": "cell_type",
    "batch": "donor",
    "scale": "counts",
}


def make_cells(paths: list[Path], num_batches: int) -> dict[str, Any]:
    """Files of simulated cells: 2 contexts x (49 perturbations + control) x own batches of one world, 20 cells each.

    What `simulate` does, without its true means: they take fifty times as many cells.
    """
    import anndata
    import jax
    import numpy as np
    from scipy.sparse import csr_matrix, vstack

    from hilbertcell.models.simulator import (
        SimulatorSettings,
        cells,
        draw_environments,
        draw_world,
        generator,
        populations,
    )

    settings = SimulatorSettings(
        contexts=("lymphoid", "myeloid"),
        perturbations=tuple(f"P{i:02d}" for i in range(49)),
        inert=(),
        combinations=(),
        num_batches=num_batches,
        num_genes=NUM_GENES,
    )
    key_world, *keys = jax.random.split(jax.random.key(0), 1 + len(paths))
    world = draw_world(key_world, settings)
    codes = np.indices((2, len(settings.labels), num_batches)).reshape(3, -1)
    labels = [np.array(x) for x in (settings.contexts, settings.labels, settings.batches)]
    names = [label[np.repeat(code, 20)] for label, code in zip(labels, codes, strict=True)]
    obs = pd.DataFrame(
        dict(zip(("cell_type", "perturbation", "donor"), names, strict=True)), dtype="category"
    )
    for path, key in zip(paths, keys, strict=True):
        environments = draw_environments(key, settings, num_batches)
        rates = jax.device_get(populations(settings, world, environments, *codes))
        rng = generator(key)
        counts = [
            csr_matrix(cells(rng, settings, world, rates, p, 20)[0], dtype="f4")
            for p in range(codes.shape[1])
        ]
        anndata.AnnData(vstack(counts, "csr"), obs.set_index(obs.index.astype(str))).write_h5ad(path)
    return {"cells": len(obs)}


def fit_cells(path: Path, out: Path) -> dict[str, Any]:
    """Fit, with the seconds of its parts; compilation is what XLA says it took."""
    import jax.monitoring

    from hilbertcell.data.anndata_io import read_populations
    from hilbertcell.data.moments import stream_moments
    from hilbertcell.inference import fit as module

    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: (
            compiled.append(seconds) if name.endswith("backend_compile_duration") else None
        )
    )
    taken: dict[str, float] = {}

    def timed(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = step(*args, **options)
            taken[name] = taken.get(name, 0.0) + time.perf_counter() - start
            return result

        return run

    module.stream_moments = timed("streaming", stream_moments)
    module.embed = timed("coordinates", module.embed)
    module.infer = timed("inference", module.infer)
    start = time.perf_counter()
    populations = read_populations(path, **KEYS)
    taken["reading"] = time.perf_counter() - start
    fitted = module.fit(populations, seed=0)
    fitted.save(out)
    return {
        "populations": len(populations.labels),
        **{f"{name}, s": seconds for name, seconds in taken.items()},
        "of that compiling, s": sum(compiled),
    }


def predict_cells(fit: Path, path: Path, out: Path) -> dict[str, Any]:
    """500 draws of all populations of a file of new batches."""
    from hilbertcell.data.anndata_io import read_populations
    from hilbertcell.inference.fit import load_fit

    fitted = load_fit(fit)
    populations = read_populations(path, **KEYS)
    start = time.perf_counter()
    drawn = fitted.predict(populations, new_batch=True, out=out)
    sizes = drawn["predictions"].sizes
    drawn.close()
    return {
        "populations": sizes["population"],
        "draws": sizes["draw"],
        "prediction, s": time.perf_counter() - start,
        "genes of all draws, GB": 8e-9 * sizes["draw"] * sizes["population"] * sizes["gene"],
        "file, GB": out.stat().st_size / 1e9,
    }


def _measured(step: Callable[..., dict[str, Any]], args: tuple[Any, ...], sender: Any) -> None:
    result = step(*args)
    sender.send(result | {"peak RSS, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6})


def in_own_process(step: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Run a step where its peak memory can be told; RuntimeError if it fails."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(step, args, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{step.__name__} failed; its error stands above") from None
    finally:
        process.join()


def main() -> None:
    """Run the benchmark; print the part of docs/benchmarks.md and write it."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.size_benchmark", description=__doc__)
    parser.add_argument("--batches", type=int, default=20, help="100 populations each")
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the parts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train, new = Path(folder, "train.h5ad"), Path(folder, "new.h5ad")
        in_own_process(make_cells, [train, new], options.batches)
        steps = {
            "fit": in_own_process(fit_cells, train, Path(folder, "fit")),
            "predict": in_own_process(predict_cells, Path(folder, "fit"), new, Path(folder, "draws.nc")),
        }
    tables = [
        markdown(pd.DataFrame({name: {k: f"{v:,.4g}" for k, v in step.items()}}).T).replace(
            "| model |", "| |", 1
        )
        for name, step in steps.items()
    ]
    text = "\n".join(tables)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "size.md").write_text(text)
    (options.out / "size.json").write_text(json.dumps(steps, indent=1))
    print(text)


if __name__ == "__main__":
    main()

"""How fast cells are moved: simulated counts of given density, rates known and fitted."""

import cProfile
import pstats
import time
from collections.abc import Callable

import numpy as np
from scipy import sparse

from hilbertcell.data.populations import natural_scale
from hilbertcell.models.count_transport import transport_counts
from hilbertcell.models.expression_state import fit_expression_state


def simulated_counts(
    num_cells: int, num_genes: int, density: float, fold: np.ndarray, seed: int
) -> sparse.csr_array:
    """Gamma-Poisson counts of three kinds of cells, shares times `fold` (G,), with that share of non-zero counts."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    share = world.gamma(0.5, size=num_genes) + 0.002
    kinds = share * np.exp(0.5 * world.normal(size=(3, num_genes))) * fold
    kinds /= kinds.sum(1, keepdims=True)
    low, high = 10.0, 1e5
    for _ in range(30):
        depth = np.sqrt(low * high)
        low, high = (depth, high) if (1 - np.exp(-depth * kinds)).mean() < density else (low, depth)
    blocks = []
    for first in range(0, num_cells, 1000):
        n = min(1000, num_cells - first)
        rates = depth * rng.lognormal(0, 0.3, (n, 1)) * kinds[rng.integers(0, 3, n)]
        blocks.append(
            sparse.csr_array(rng.poisson(rates * rng.gamma(2.0, 0.5, rates.shape)).astype(np.float32))
        )
    return sparse.csr_array(sparse.vstack(blocks))


def speed(num_cells: int, num_genes: int = 2000, density: float = 0.1, repeats: int = 5) -> dict[str, str]:
    """Seconds and cells per second at targets where all genes change (log sd 0.1, the first 40 by log sd 1).

    Best of `repeats`; wall time on all cores, process time summed over them. Molecules are drawn while gains are solved
    for: what is left for emission is to put them together.
    """
    rng = np.random.default_rng(1)
    fold = np.exp(rng.normal(0, np.where(np.arange(num_genes) < 40, 1.0, 0.1)))
    counts = simulated_counts(num_cells, num_genes, density, np.ones(num_genes), 1)
    truth = simulated_counts(min(num_cells, 4000), num_genes, density, fold, 2)
    library, true_library = (np.asarray(y.sum(1), dtype=np.float64) for y in (counts, truth))
    target = natural_scale(truth, "counts", true_library).mean(0)
    state = fit_expression_state(counts, library)

    def move() -> None:
        transport_counts(counts, library, target, 1.0, np.random.default_rng(2), state)

    fit_wall, fit_cpu = _best(lambda: fit_expression_state(counts, library), repeats)
    wall, cpu = _best(move, repeats)
    profile = cProfile.Profile()  # of this thread, which waits for the others: wall time
    profile.runcall(move)
    steps = pstats.Stats(profile).get_stats_profile().func_profiles
    total = steps["transport_counts"].cumtime
    return {
        "density": f"{counts.nnz / np.prod(counts.shape):.3f}",
        "fitting rates: wall, process (s)": f"{fit_wall:.3f}, {fit_cpu:.3f}",
        "moving cells: wall, process (s)": f"{wall:.3f}, {cpu:.3f}",
        "... of which gains": f"{steps['solve_gains'].cumtime / total:.0%}",
        "... of which emission": f"{steps['_assemble'].cumtime / total:.0%}",
        "cells/s, rates known: wall, process": f"{num_cells / wall:,.0f}, {num_cells / cpu:,.0f}",
        "cells/s, rates fitted: wall, process": f"{num_cells / (wall + fit_wall):,.0f}, {num_cells / (cpu + fit_cpu):,.0f}",
    }


def _best(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Least wall and process time."""
    taken = []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        run()
        taken.append((time.perf_counter() - start, time.process_time() - used))
    walls, processes = zip(*taken, strict=True)
    return min(walls), min(processes)

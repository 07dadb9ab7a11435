"""How often checks raise an alarm where nothing is wrong: simulations of every null law, at the level of arrays."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from scipy.stats import binom

from hilbertcell.inference.calibration import small_experiment, uniformity_p
from hilbertcell.inference.diagnostics import batches, convergence
from hilbertcell.inference.diagnostics.held_out import HeldOut, held_out_checks
from hilbertcell.inference.diagnostics.microenvironments import explained_by
from hilbertcell.inference.diagnostics.posterior import latent_table
from hilbertcell.inference.diagnostics.replicates import Kinds, predictive_checks
from hilbertcell.inference.diagnostics.result import ALARM, WATCH, Result, judged
from hilbertcell.models.microenvironment import Globals, PopulationMeans

NUM_SIMULATIONS = 1000
_REPLICATES = 199
Simulation = Callable[[np.random.Generator], dict[str, Result]]


class Rate(NamedTuple):
    """Alarms of one check among N simulations where nothing is wrong."""

    check: str
    simulated: str
    number: int
    alarms: int
    flagged: int  # alarms and watches
    tested: bool  # by a p-value; thresholds are never to be crossed

    @property
    def intervals(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Binomial 99 % intervals of both counts at their nominal levels."""
        levels = (ALARM, WATCH) if self.tested else (0.0, 0.0)
        return interval(self.number, levels[0]), interval(self.number, levels[1])

    @property
    def holds(self) -> bool:
        """Whether both counts lie in their intervals."""
        counts = (self.alarms, self.flagged)
        return all(low <= count <= high for count, (low, high) in zip(counts, self.intervals, strict=True))


def interval(number: int, level: float) -> tuple[int, int]:
    """Binomial 99 % interval of a count."""
    low, high = binom.ppf([0.005, 0.995], number, level)
    return max(int(low), 0), max(int(high), 0)


def course(rng: np.random.Generator) -> dict[str, Result]:
    """A bound that gains exactly what is tolerated, with noise of t(3)."""
    losses = 5.0 * rng.standard_t(3, 1000)
    losses[-100:] -= convergence.DRIFT * 400
    return {"course": convergence.bound_drift(losses, 400)}


def guide(rng: np.random.Generator) -> dict[str, Result]:
    """A Gaussian posterior and a guide as far from it, and as wide, as is tolerated."""
    shift = rng.standard_normal(200)
    shift *= convergence.DISTANCE / np.sqrt((shift**2).mean())
    noise = rng.standard_normal((64, 200))
    square = (noise**2).mean(1)
    width = convergence.WIDTHS[1] ** 2 * square
    return {
        "guide_location": convergence.guide_location(-shift - noise),
        "guide_width": convergence.guide_width(width),
    }


def technical(rng: np.random.Generator) -> dict[str, Result]:
    """Six batches, one factor, three covariates that are correlated with each other, but not with it."""
    common = rng.standard_normal((6, 1))
    values = common + rng.standard_normal((6, 3))
    found = explained_by(rng.standard_normal((6, 1)), values, ("a", "b", "c"), rng)
    return {"technical": found}


def copies(rng: np.random.Generator) -> dict[str, Result]:
    """Cells of 6 batches x 4 kinds, 40 a population, 12 correlated genes; half of a kind's cells are in all batches."""
    mixing = rng.standard_normal((12, 12))
    cells = rng.standard_normal((6, 4, 40, 12)) @ mixing
    cells[:, :, :20] = cells[0, :, :20]
    means = cells.mean(2).reshape(24, 12)
    noise = rng.standard_normal((_REPLICATES, 24, 12)) @ mixing / np.sqrt(40)
    variance = np.tile((mixing**2).sum(0) / 40, (24, 1))
    kind = np.tile(np.arange(4), 6)
    pairs = np.array([(i, j) for i in range(24) for j in range(i) if kind[i] == kind[j]])
    return {"copies": batches.copied_cells(means, variance, pairs, noise, [str(i) for i in range(24)])}


def labels(rng: np.random.Generator) -> dict[str, Result]:
    """Labels that mean nothing: passing is the error here, with probability 5 %; counted as flags."""
    kind, batch = np.tile(np.arange(4), 6), np.repeat(np.arange(6), 4)
    residual = rng.standard_normal((24, 12))
    residual = residual.reshape(6, 4, 12) - residual.reshape(6, 4, 12).mean(0)
    found = batches.batch_labels(residual.reshape(24, 12), kind, batch, rng)
    return {"labels": judged(found.statistic, found.p if found.p is not None else 1.0)}


def response(rng: np.random.Generator) -> dict[str, Result]:
    """Eight batches, four conditions, 12 genes; batches differ by a strength of their own, gene by gene, and noise."""
    effect = rng.standard_normal((4, 12))
    strength = 1 + 0.2 * rng.standard_normal((8, 1, 1))
    found = strength * effect + 0.3 * rng.standard_normal((8, 1, 12)) + 0.3 * rng.standard_normal((8, 4, 12))
    slopes = batches.response_slopes(found, np.ones((8, 4), bool))
    return {"response": batches.outlying_batch(slopes, [str(b) for b in range(8)], rng)}


def scale(rng: np.random.Generator) -> dict[str, Result]:
    """Log sds of six batches about a common one, as normal as their medians over genes are."""
    return {"scale": batches.outlying_batch(0.1 * rng.standard_normal(6), list("abcdef"), rng)}


def held_out(rng: np.random.Generator) -> dict[str, Result]:
    """Six batches of 4 populations x 24 genes; truth and draws share a hidden condition per batch, nothing is wrong."""
    held = []
    for batch in range(6):
        loading, mean = 0.5 * rng.standard_normal((4, 24)), rng.standard_normal((4, 24))
        u, noise = rng.standard_normal((101, 1, 1)), rng.standard_normal((101, 4, 24))
        table = mean + loading * u + 0.7 * noise
        held.append(HeldOut(str(batch), table[0], table[1:], np.zeros((4, 24))))
    return held_out_checks(held, rng)


def chains(rng: np.random.Generator) -> dict[str, Result]:
    """Four chains of 250 independent draws of 50 quantities: a threshold, never to be crossed."""
    draws = rng.standard_normal((4, 250, 50))
    rhat, ess = np.max(split_gelman_rubin(draws)), np.min(effective_sample_size(draws))
    return {"chains": convergence.chains(np.array([rhat]), np.array([ess]), np.zeros((4, 250)), ("all",))}


def calibration(rng: np.random.Generator) -> dict[str, Result]:
    """Uniform ranks of 50 simulations among 19 draws."""
    p = uniformity_p(rng.integers(0, 20, 50), 19, rng)
    return {"calibration": judged(p, p)}


def program_tables(number: int, seed: int) -> Simulation:
    """Tables of the program with known unknowns against replicates under the same: exact p-values.

    Eight batches, two contexts, three conditions, three genes. Measured tables come from the program's own law
    (`PopulationMeans.sample`), replicates from the generator that `diagnose` uses.
    """
    with jax.enable_x64(True):
        layout = small_experiment().layout
        globals_ = _globals(np.random.default_rng(seed))
        keys = jax.random.split(jax.random.key(seed), (2, number * _REPLICATES))
        observed = jax.jit(jax.vmap(PopulationMeans(globals_, layout).sample))(keys[0, :number])
        latent = jax.jit(jax.vmap(lambda key: latent_table(key, globals_, layout)))(keys[1])
        shape = observed.shape[1:]
        noise = np.random.default_rng(seed).standard_normal(latent.shape) * np.sqrt(np.asarray(layout.noise))
    tables = np.asarray(observed).reshape(number, -1, shape[-1])
    replicates = (np.asarray(latent) + noise).reshape(number, _REPLICATES, -1, shape[-1])
    kinds = Kinds(np.arange(shape[0] * shape[1]).reshape(shape[:2]), np.array([0, 1, 0, 0, 1]))
    place = iter(range(number))

    def simulation(_: np.random.Generator) -> dict[str, Result]:
        i = next(place)
        return predictive_checks(tables[i], replicates[i], kinds)

    return simulation


def _globals(rng: np.random.Generator) -> Globals:
    """Unknowns of the program for two contexts, three conditions, three features and one factor."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    fixed = lambda value, *shape: jnp.full(shape, value)
    return Globals(
        normal(2, 3), normal(3, 3), fixed(1.0, 3), jnp.asarray([1.0, 0.7, 1.0]), fixed(-0.3, 3), 0.2 * normal(3, 1),
        0.2 * normal(3, 1), fixed(0.2, 2, 3), fixed(0.2, 2, 3), fixed(0.1, 3),
    )  # fmt: skip


SIMULATIONS: tuple[Simulation, ...] = (
    course, guide, technical, copies, labels, response, scale, held_out, chains, calibration,
)  # fmt: skip


def rates(simulation: Simulation, number: int, seed: int = 0, simulated: str = "") -> list[Rate]:
    """Alarms of every check of a simulation among `number` runs."""
    rng = np.random.default_rng(seed)
    counts: dict[str, list[int]] = {}
    tested: dict[str, bool] = {}
    for _ in range(number):
        for name, result in simulation(rng).items():
            count = counts.setdefault(name, [0, 0])
            count[0] += result.verdict == "alarm"
            count[1] += result.verdict != "ok"
            tested[name] = result.p is not None
    told = " ".join((simulated or simulation.__doc__ or "").split())
    return [
        Rate(name, told, number, alarms, flagged, tested[name]) for name, (alarms, flagged) in counts.items()
    ]


def all_rates(number: int = NUM_SIMULATIONS, seed: int = 0) -> list[Rate]:
    """Rates of every check that has a null law, and of the thresholds of chains."""
    found = [rate for simulation in SIMULATIONS for rate in rates(simulation, number, seed)]
    told = (program_tables.__doc__ or "").split("\n\n")[1]
    return found + rates(program_tables(number, seed), number, seed, told)

"""Generated cells of populations: sets of the training's size, all populations together, in blocks of few shapes."""

import hashlib
from collections.abc import Iterator, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from hilbertcell.data.populations import Populations
from hilbertcell.inference.perturbdiff.cell_sets import Cells, Expression, Partners
from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings
from hilbertcell.inference.perturbdiff.training_run import Networks
from hilbertcell.inference.perturbdiff.vocabulary import Vocabulary
from hilbertcell.models.perturbdiff import (
    ddim_steps,
    dpm_steps,
    guided,
    linear_schedule,
    sample,
    source_index,
    strided_times,
)
from hilbertcell.models.perturbdiff.objective import rounded
from hilbertcell.models.perturbdiff.sampling import Steps

_BLOCK_CELLS = 4096  # generated at a time


def generate(
    networks: Networks,
    vocabulary: Vocabulary,
    unit: Expression,
    settings: PerturbDiffSettings,
    controls: Populations,
    targets: pd.DataFrame,
    num_cells: Sequence[int] | np.ndarray,
    seed: int,
    u: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Cells (n, G) of every target on the natural scale.

    A population of n cells is made of sets of `settings.set_size`, what is beyond n left out. Its noise and partners
    depend on `seed` and its name alone.

    Args:
        networks: denoiser and covariate encoder.
        vocabulary: ids of labels.
        unit: model units.
        settings: sampler, steps, guidance, set size, precision, source.
        controls: populations whose controls stand beside the generated cells, same genes as the fit.
        targets: T rows of labels (context, perturbation, dose, batch), index = names.
        num_cells: (T,) n.
        seed: of noise and partners.
        u: (T, K) microenvironments, for a fit that takes them.

    Raises:
        DataError: a label that the fit does not know, or a (context, batch) without controls.
    """
    denoiser, encoder = networks
    size = settings.set_size
    ids = vocabulary.ids(targets)
    partners, cells = Partners(controls), Cells(controls, unit, held_bytes=0)
    num_sets = [-(-int(n) // size) for n in num_cells]
    owner = np.repeat(np.arange(len(targets)), num_sets)
    noise, beside = [], []
    keys = zip(targets.index, targets["context"], targets["batch"], num_sets, strict=True)
    for name, context, batch, number in keys:
        digest = hashlib.sha256(str(name).encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
        for _ in range(number):
            beside.append(partners.draw(rng, context, batch, size))
            noise.append(rng)
    source = source_index(denoiser, settings.source or "") if denoiser.sources else None
    if settings.precision != "float32":
        denoiser = rounded(denoiser, settings.precision)
    strength = settings.guidance or None
    made: list[list[np.ndarray]] = [[] for _ in num_sets]
    for rows in _blocks(len(owner), max(1, _BLOCK_CELLS // size)):
        control = cells(np.stack([beside[i] for i in rows]))
        if settings.drop_control == 1:
            control = np.zeros_like(control)
        start = np.stack(
            [noise[i].standard_normal(control.shape[1:], np.float32) for i in dict.fromkeys(rows)]
        )
        start = np.concatenate([start, start[:1].repeat(len(rows) - len(start), axis=0)])
        own = ids[owner[rows]]
        x0 = sample_sets(
            denoiser,
            jnp.asarray(start),
            jnp.asarray(control),
            encoder(*(own[:, j, None] for j in range(3))),
            None if strength is None else jnp.asarray(strength, jnp.float32),
            (settings.sampler, settings.start_time, settings.sample_steps),
            None if source is None else jnp.full(len(rows), source),
            None if u is None else jnp.asarray(u[owner[rows]], jnp.float32),
        )
        for i, x in zip(dict.fromkeys(rows), np.asarray(x0), strict=False):
            made[owner[i]].append(x)
    return [
        unit.to_natural(np.concatenate(sets)[: int(n)]) if sets else np.empty((0, denoiser.num_genes))
        for sets, n in zip(made, num_cells, strict=True)
    ]


def sampler_steps(sampler: str, start_time: int, num_steps: int) -> Steps:
    """The step rule that settings name, over indices start_time - 1 to 0."""
    rule = {"ddim": ddim_steps, "dpm": dpm_steps}[sampler]
    return rule(linear_schedule(), strided_times(num_steps, start_time))


@eqx.filter_jit
def sample_sets(denoiser, noise, control, covariates, strength, rule, source, u) -> Array:
    """Compiled: sets (B, S, G) from noise; `rule` = (sampler, start_time, steps), `strength` a scalar array or None."""
    estimate = guided(denoiser, control, covariates, 0 if strength is None else strength, source=source, u=u)
    return sample(estimate, sampler_steps(*rule), noise)


def _blocks(number: int, most: int) -> Iterator[np.ndarray]:
    """Rows 0..number-1 in blocks of `most`; the last is filled with its first row up to a power of two.

    So there are few shapes to compile for, whatever the populations.
    """
    for start in range(0, number, most):
        rows = np.arange(start, min(start + most, number))
        bucket = min(most, 1 << (len(rows) - 1).bit_length())
        yield np.append(rows, np.full(bucket - len(rows), rows[0]))

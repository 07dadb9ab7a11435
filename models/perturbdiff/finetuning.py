"""From pretrained networks to ones that are ready for other data: what is kept, what is drawn again.

Published: both heads are drawn again, the perturbation branch is new, blocks and embedders are kept. Options: other genes
(new input maps and heads; the class map and the covariate map keep the old width), modulations of the blocks set to
zero, embedders for another data set. Labels that the tables do not know get new rows below the old ones.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hilbertcell.models.perturbdiff import layers
from hilbertcell.models.perturbdiff.blocks import init_head
from hilbertcell.models.perturbdiff.covariates import CovariateEncoder, GivenTable, LearnedTable
from hilbertcell.models.perturbdiff.denoiser import Denoiser
from hilbertcell.models.perturbdiff.layers import Affine


class Changes(NamedTuple):
    """What the new data need."""

    perturbations: int | np.ndarray  # labels, or a given table (labels, width)
    cell_types: int = 0  # labels in all, those of the old table first; 0 keeps it
    batches: int = 0  # likewise; an encoder without a batch branch stays without
    num_genes: int | None = None  # of another gene space; None keeps the input maps
    source: str | None = None  # data set with embedders of its own, new if it is not known
    reset_modulation: bool = False


def prepare(
    key: Array, denoiser: Denoiser, encoder: CovariateEncoder, changes: Changes
) -> tuple[Denoiser, CovariateEncoder]:
    """Networks to fine-tune.

    Raises:
        ValueError: a source was named for networks whose data sets share one embedder, or the cell types are a given table
            that does not hold the new ones.
    """
    keys = iter(jax.random.split(key, 8))
    return _denoiser(next(keys), denoiser, changes), _encoder(next(keys), encoder, changes)


def _denoiser(key: Array, denoiser: Denoiser, changes: Changes) -> Denoiser:
    hidden = denoiser.null_class.shape[1]
    keys = iter(jax.random.split(key, 2 * len(denoiser.sources) + 8))
    num_genes = changes.num_genes or denoiser.num_genes
    other_genes = changes.num_genes is not None

    def embedders(old: Affine | dict[str, Affine]) -> Affine | dict[str, Affine]:
        if isinstance(old, Affine):
            return layers.xavier(next(keys), hidden, 2 * num_genes) if other_genes else old
        wanted = dict.fromkeys([*denoiser.sources, *([changes.source] if changes.source else [])])
        return {
            name: old[name]
            if name in old and not other_genes
            else layers.xavier(next(keys), hidden, 2 * num_genes)
            for name in wanted
        }

    if changes.source is not None and not denoiser.sources:
        raise ValueError(
            f"source = {changes.source!r}: all data sets share one embedder of these networks; leave it out"
        )
    heads = [init_head(next(keys), num_genes, hidden) for _ in range(2)]
    if other_genes:  # published: the rebuilt maps keep the framework's default initialisation
        heads = [
            eqx.tree_at(lambda h: h.linear, head, layers.fan_in(next(keys), num_genes, hidden))
            for head in heads
        ]
    blocks = denoiser.blocks
    if changes.reset_modulation:
        blocks = eqx.tree_at(
            lambda blocks: [m for b in blocks for m in (b.modulation, b.control_modulation)],
            blocks,
            replace_fn=lambda affine: jax.tree.map(jnp.zeros_like, affine),
            is_leaf=lambda x: isinstance(x, Affine),
        )
    return eqx.tree_at(
        lambda d: (d.embed, d.embed_control, d.head, d.control_head, d.blocks),
        denoiser,
        (embedders(denoiser.embed), embedders(denoiser.embed_control), *heads, blocks),
        is_leaf=lambda x: isinstance(x, dict),
    )


def _encoder(key: Array, encoder: CovariateEncoder, changes: Changes) -> CovariateEncoder:
    keys = iter(jax.random.split(key, 4))
    own = encoder.cell_type
    hidden = own.affine.weight.shape[0] if isinstance(own, GivenTable) else own.table.shape[1]
    perturbation: LearnedTable | GivenTable
    if isinstance(changes.perturbations, int):
        perturbation = LearnedTable(layers.gaussian(next(keys), changes.perturbations + 1, hidden), 1)
    else:
        width = changes.perturbations.shape[1]
        perturbation = GivenTable(
            jnp.asarray(changes.perturbations, layers.FLOAT), layers.fan_in(next(keys), hidden, width), 0
        )
    if changes.cell_types > len(own.table) and isinstance(own, GivenTable):
        raise ValueError(
            f"cell types: {changes.cell_types} labels, and the given table holds {len(own.table)}; use the names it knows"
        )
    key_types, key_batches = next(keys), next(keys)
    transform = encoder.transform
    if encoder.drug is not None:  # drug and dose gave two branches, a perturbation gives one
        dropped = hidden * (2 if encoder.dose is not None else 1)
        kept = transform.weight[:, dropped:]
        fresh = layers.fan_in(next(keys), len(kept), hidden + kept.shape[1]).weight[:, :hidden]
        transform = Affine(jnp.concatenate([fresh, kept], axis=1), transform.bias)
    return CovariateEncoder(
        perturbation=perturbation,
        drug=None,
        dose=None,
        dose_rank=None,
        cell_type=own if isinstance(own, GivenTable) else _extended(key_types, own, changes.cell_types),
        batch=None if encoder.batch is None else _extended(key_batches, encoder.batch, changes.batches),
        transform=transform,
    )


def _extended(key: Array, table: LearnedTable, labels: int) -> LearnedTable:
    """A table with rows for at least that many labels, new ones N(0, 1)."""
    more = max(0, labels - len(table.table))
    fresh = layers.gaussian(key, more, table.table.shape[1])
    return LearnedTable(jnp.concatenate([table.table, fresh]), table.offset)

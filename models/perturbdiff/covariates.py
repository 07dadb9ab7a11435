"""From covariate labels to the vector that conditions the denoiser.

One branch each for the perturbation (or drug and dose), the cell type and the batch, every one of the same width,
joined in that order and mapped by one affine map:

    cov = affine[ perturbation, (dose,) cell type, (batch) ]

A branch is a learned table (one-hot), or a given, never trained table (text, gene or drug embeddings) followed by an
affine map. The published scripts number labels by sorting the names found in the files; the numbering belongs to
the checkpoint, so ids here are whatever its tables were made with.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from hilbertcell.models.perturbdiff import layers
from hilbertcell.models.perturbdiff.layers import Affine

NO_PERTURBATION = -1  # id of "no perturbation" (row 0) in a one-hot table


class LearnedTable(eqx.Module):
    """One learned row per label; `offset` is the row of id 0."""

    OFFICIAL: ClassVar[dict[str, str]] = {"table": "weight"}

    table: Array  # (rows, width)
    offset: int = eqx.field(static=True)

    def __call__(self, ids: Array) -> Array:
        """(...) ids -> (..., width)."""
        return _rows(self.table, ids + self.offset)


class GivenTable(eqx.Module):
    """One given row per label, no gradient, then a learned affine map."""

    OFFICIAL: ClassVar[dict[str, str]] = {"table": "0.weight", "affine": "1"}

    table: Array  # (rows, input width)
    affine: Affine
    offset: int = eqx.field(static=True)

    def __call__(self, ids: Array) -> Array:
        """(...) ids -> (..., width)."""
        return self.affine(_rows(jax.lax.stop_gradient(self.table), ids + self.offset))


class CovariateEncoder(eqx.Module):
    """Integer labels of every cell to one vector; either `perturbation` or `drug` (with or without dose) is set."""

    OFFICIAL: ClassVar[dict[str, str]] = {
        "perturbation": "pert_encoder",
        "drug": "drug_encoder",
        "dose": "dose_encoder",
        "dose_rank": "dose_indices",
        "cell_type": "celltype_encoder",
        "batch": "batch_encoder",
        "transform": "transform",
    }

    perturbation: LearnedTable | GivenTable | None
    drug: GivenTable | None
    dose: LearnedTable | None
    dose_rank: Array | None  # (perturbations,) int, row of `dose` of every (drug, dose) label
    cell_type: LearnedTable | GivenTable
    batch: LearnedTable | None
    transform: Affine

    def __check_init__(self) -> None:
        """Refuse an encoder that reads both a perturbation and a drug, or neither."""
        if (self.perturbation is None) == (self.drug is None):
            raise ValueError("a covariate encoder has either a perturbation table or a drug table")

    def __call__(self, perturbation: ArrayLike, cell_type: ArrayLike, batch: ArrayLike) -> Array:
        """Encode labels.

        Args:
            perturbation: (...) integer ids; `NO_PERTURBATION` is a label of a one-hot table only.
            cell_type: (...) integer ids.
            batch: (...) integer ids; not looked at by an encoder without a batch branch.

        Returns:
            (..., output width). Under jit, where ids cannot be looked at, an unknown id gives NaN.

        Raises:
            ValueError: naming the covariate and its legal ids, if ids are known and one lies outside.
        """
        perturbation, cell_type, batch = (jnp.asarray(ids) for ids in (perturbation, cell_type, batch))
        main = self.drug if self.perturbation is None else self.perturbation
        assert main is not None  # see __check_init__
        _check_ids("perturbation", perturbation, main)
        _check_ids("cell_type", cell_type, self.cell_type)
        branches = [main(perturbation)]
        if self.dose is not None:
            branches.append(self.dose(_rows(self.dose_rank, perturbation)))
        branches.append(self.cell_type(cell_type))
        if self.batch is not None:
            _check_ids("batch", batch, self.batch)
            branches.append(self.batch(batch))
        return self.transform(jnp.concatenate(branches, axis=-1))


def init_covariate_encoder(
    key: Array,
    output_width: int,
    *,
    perturbations: int | np.ndarray,
    cell_types: int | np.ndarray,
    batches: int,
    hidden: int = 128,
    perturbation_offset: int | None = None,
) -> CovariateEncoder:
    """A new encoder with the published initialisation: tables N(0, 1), affine maps uniform in +-1/sqrt(in).

    Args:
        key: random key.
        output_width: width of the result, the denoiser's `covariate_width`.
        perturbations: number of labels for a learned table (it gets one more row, for `NO_PERTURBATION`), or a given
            table (labels, width).
        cell_types: number of labels, or a given table (labels, width).
        batches: number of labels; 0 for no batch branch.
        hidden: width of every branch.
        perturbation_offset: row of id 0; by default 1 for a learned table and 0 for a given one, as published.
    """
    keys = iter(jax.random.split(key, 4))

    def branch(labels: int | np.ndarray, offset: int, extra_rows: int = 0) -> LearnedTable | GivenTable:
        if isinstance(labels, int):
            return LearnedTable(layers.gaussian(next(keys), labels + extra_rows, hidden), offset)
        return GivenTable(
            jnp.asarray(labels, layers.FLOAT), layers.fan_in(next(keys), hidden, labels.shape[1]), offset
        )

    if perturbation_offset is None:
        perturbation_offset = int(isinstance(perturbations, int))
    return CovariateEncoder(
        perturbation=branch(perturbations, perturbation_offset, extra_rows=1),
        drug=None,
        dose=None,
        dose_rank=None,
        cell_type=branch(cell_types, 0),
        batch=branch(batches, 0) if batches else None,
        transform=layers.fan_in(next(keys), output_width, hidden * (3 if batches else 2)),
    )


def _rows(table: Array, rows: Array) -> Array:
    """Rows of a table; NaN (or, for integers, a row that no table has) outside it, never a neighbouring row."""
    fill = jnp.nan if jnp.issubdtype(table.dtype, jnp.floating) else jnp.iinfo(table.dtype).max
    return table.at[rows].get(mode="fill", fill_value=fill, wrap_negative_indices=False)


def _check_ids(name: str, ids: Array, table: LearnedTable | GivenTable) -> None:
    if isinstance(ids, jax.core.Tracer) or not ids.size:
        return
    low, high = -table.offset, len(table.table) - table.offset - 1
    if int(ids.min()) < low or int(ids.max()) > high:
        raise ValueError(
            f"{name}: ids {int(ids.min())}..{int(ids.max())} given, the table holds {low}..{high}; "
            "number labels as the checkpoint did"
        )

"""Predict: from a fit and the cells of its batches to labelled draws of whole response distributions."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import pandas as pd
import xarray as xr
from jax import Array
from rich.progress import Progress

from hilbertcell.data.draws_io import read_draws, write_draws, write_rows
from hilbertcell.data.perturbations import PerturbationTable, perturbation_table
from hilbertcell.data.populations import Populations
from hilbertcell.data.validation import DataError
from hilbertcell.inference.diffusion_conditions import label_features
from hilbertcell.inference.diffusion_law import mapping_of
from hilbertcell.inference.draws_tree import draws_attrs, per_draw, population_groups, training_groups
from hilbertcell.inference.gene_draws import QUANTITIES, fit_gene_map
from hilbertcell.inference.predictive import BatchDraws, BatchTargets, draw_batch, draw_globals
from hilbertcell.inference.requests import Given, batch_targets, choose_targets, read_batches, stream_of
from hilbertcell.inference.tables import Vocabulary, condition_of
from hilbertcell.inference.training_draws import TrainingDraws
from hilbertcell.models.microenvironment import Globals

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

# Draws of genes up to this size are held in memory and stored as they are: what a laptop has room for beside the
# data. Larger ones are made in pieces, stored as coordinates, and made again when they are asked for.
MAX_BYTES = 2_000_000_000
_PIECES = 8  # of MAX_BYTES each: a piece is held beside what it is made from


def predict(
    fit: "Fit",
    populations: Populations,
    *,
    targets: pd.DataFrame | None = None,
    num_samples: int = 500,
    seed: int = 0,
    observe: bool = False,
    new_batch: bool = False,
    out: str | Path | None = None,
    progress: bool = False,
) -> xr.DataTree:
    """Draw latent population means of targets given the controls of their batches.

    Args:
        fit: the fit.
        populations: cells of the batches to predict for; perturbed ones are ignored unless `observe`.
        targets: columns context, perturbation, batch and, for doses, dose; None: every (perturbation, dose) of the
            fit for every (context, batch) of the file.
        num_samples: draws S.
        seed: same seed, same draws.
        observe: condition on the file's perturbed populations too (few-shot update).
        new_batch: treat every batch of the file as new, even under a name that the fit knows.
        out: netCDF file that the draws are written to; they are returned as read from it. Draws of genes above 2 GB
            need it: they are written in pieces, as coordinates with maps to genes (`inference.gene_draws`).
        progress: show a progress bar.

    Returns:
        DataTree with groups predictions, posterior, log_likelihood, posterior_predictive, observed_data,
        constant_data and sample_stats (docs: "The draws").

    Raises:
        DataError: genes, scale, contexts or perturbations that the fit does not know; a known batch name with
            other controls; a target whose batch the file lacks; draws above 2 GB without `out`.
    """
    if num_samples < 2:
        raise DataError(f"num_samples = {num_samples}: a law needs at least 2 draws; ask for 500")
    given = read_batches(fit, populations, observe, new_batch)
    request = _request(fit, populations, given, targets, num_samples, seed)
    wanted, num_genes = request.wanted, len(fit.genes)
    size = 2 * 4 * num_samples * len(wanted) * num_genes
    if size > MAX_BYTES and out is None:
        raise DataError(
            f"num_samples x targets x genes = {num_samples} x {len(wanted)} x {num_genes}: the draws would take "
            f"{size / 1e9:.1f} GB of memory, of at most {MAX_BYTES / 1e9:.0f}; name a file for them (out), ask for fewer "
            "draws or name fewer targets"
        )
    if out is not None and Path(out).exists():
        raise DataError(f"out = {str(out)!r}: exists; remove it or name another file")
    step = len(wanted) if size <= MAX_BYTES else max(1, len(wanted) * MAX_BYTES // (_PIECES * size))
    pieces = [slice(i, min(i + step, len(wanted))) for i in range(0, len(wanted), step)]
    training = TrainingDraws(fit, given, seed)
    with jax.enable_x64(True), Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("drawing", total=num_samples * len(pieces))
        advance: Callable[[int], None] = lambda draws: bar.advance(task, draws)
        if out is not None and size > MAX_BYTES:
            groups, new = _write_pieces(fit, request, pieces, training, Path(out), advance)
        else:
            drawn = _draw(fit, request, pieces[0], training, advance)
            groups, new = population_groups(fit, wanted, given, drawn.whole()), drawn.microenvironments
    for name, dataset in training_groups(fit, given, training, new).items():
        groups[name] = dataset.merge(groups[name], combine_attrs="override") if name in groups else dataset
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = draws_attrs(fit) | {"seed": seed, "observe": int(observe)}
    if out is None:
        return tree
    write_draws(tree, out)
    return read_draws(out)


class _Request(NamedTuple):
    """What is to be drawn, in the indices of programs."""

    given: Given
    wanted: pd.DataFrame
    names: Vocabulary
    perturbations: PerturbationTable
    num_samples: int
    seed: int


class _Drawn(NamedTuple):
    """Draws of T targets on the scale of the data, float32, and of the microenvironments of their new batches."""

    mean: np.ndarray  # (S, T, G)
    shift: np.ndarray  # (S, T, G)
    embedding: np.ndarray  # (S, T, Q)
    microenvironments: dict[str, np.ndarray]  # (S, K) by batch

    def whole(self) -> dict[str, Any]:
        """Variables with every draw of every gene."""
        return {
            "mean": per_draw(self.mean, "population", "gene"),
            "shift": per_draw(self.shift, "population", "gene"),
            "embedding": per_draw(self.embedding, "population", "coordinate"),
        }

    def compressed(self, piece: int) -> dict[str, Any]:
        """Variables from which `gene_draws` makes the genes; the gene maps belong to `piece`."""
        fitted = fit_gene_map(self.mean, self.shift, self.embedding)
        by_gene: dict[str, Any] = {"rest_correlation": fitted.correlation}
        for q, quantity in enumerate(QUANTITIES):
            by_gene |= {f"{quantity}_center": fitted.center[q], f"{quantity}_rest_sd": fitted.sd[q]}
        return {
            "embedding": per_draw(self.embedding, "population", "coordinate"),
            **{name: (("population", "gene"), np.float32(values)) for name, values in by_gene.items()},
            **{
                f"{quantity}_map": (("map", "coordinate", "gene"), np.float32(fitted.maps[q])[None])
                for q, quantity in enumerate(QUANTITIES)
            },
            "map_index": ("population", np.full(self.mean.shape[1], piece)),
        }


def _request(
    fit: "Fit", populations: Populations, given: Given, targets: pd.DataFrame | None, num_samples: int, seed: int
) -> _Request:  # fmt: skip
    """Targets checked, and the vocabulary extended by what training did not see."""
    wanted = choose_targets(fit, given.moments.labels, targets)
    names = fit.names.extend(condition_of(wanted))
    features = populations.perturbation_features if fit.features is None else fit.features
    perturbations = perturbation_table(
        list(dict.fromkeys(perturbation for _, perturbation, _ in names.conditions)),
        fit.keys.control,
        features=fit.features,
        singles=None if fit.features is not None else fit.perturbations.singles,
    )
    if fit.features is None and features is not None:
        given.notices.append("perturbation features were given, but the fit was made without any: not used")
    return _Request(given, wanted, names, perturbations, num_samples, seed)


def _draw(
    fit: "Fit", request: _Request, rows: slice, training: TrainingDraws | None, advance: Callable[[int], None]
) -> _Drawn:  # fmt: skip
    """Draw the targets in `rows`, block of draws by block; and `training`, if given, from the same globals."""
    given, wanted, num_samples = request.given, request.wanted, request.num_samples
    draw_targets = _drawer(fit, request)
    batch_of = wanted["batch"].to_numpy()[rows]
    places = {batch: rows.start + np.flatnonzero(batch_of == batch) for batch in sorted(set(batch_of))}
    asked = {
        batch: batch_targets(request.names, wanted, place, given.table if batch in given.new else fit.table)
        for batch, place in places.items()
    }
    num_genes, shape = len(fit.genes), (num_samples, len(batch_of))
    mean, shift = np.empty((*shape, num_genes), np.float32), np.empty((*shape, num_genes), np.float32)
    embedding = np.empty((*shape, fit.coordinates.A.shape[1]), np.float32)
    factors: dict[str, list[np.ndarray]] = {batch: [] for batch in places if batch in given.new}
    root = jax.random.key(request.seed)
    keys, training_keys = (jax.random.split(jax.random.fold_in(root, i), num_samples) for i in (1, 2))
    own_keys = jax.vmap(jax.random.fold_in, (0, None))
    for block, globals_ in draw_globals(fit, request.names, request.perturbations, num_samples, request.seed):
        for batch, place in places.items():
            drawn = draw_targets(own_keys(keys[block], stream_of(batch)), globals_, asked[batch])
            response, control = fit.unit.undo(drawn.response), fit.unit.undo(drawn.control)
            here = place - rows.start
            mean[block, here] = response[..., :num_genes]
            shift[block, here] = (response - control)[..., :num_genes]
            embedding[block, here] = fit.coordinates.project(response)
            if batch in given.new:
                factors[batch].append(drawn.microenvironment)
        if training is not None:
            training.add(training_keys[block], globals_)
        advance(block.stop - block.start)
    if not (np.isfinite(mean).all() and np.isfinite(shift).all()):
        warnings.warn("some draws are not finite; the fit cannot be trusted", RuntimeWarning, stacklevel=4)
    return _Drawn(mean, shift, embedding, {batch: np.concatenate(u) for batch, u in factors.items()})


def _drawer(fit: "Fit", request: _Request) -> Callable[[Array, Globals, BatchTargets], BatchDraws]:
    """How targets of one batch are drawn under the response law of the fit."""
    if fit.diffusion is None:
        return draw_batch
    labels, _ = label_features(request.names, request.perturbations, fit.perturbations.singles)
    mapping, law = mapping_of(fit), fit.diffusion
    return lambda keys, globals_, targets: law.draw_batch(mapping, keys, globals_, targets, labels)


def _write_pieces(
    fit: "Fit", request: _Request, pieces: list[slice], training: TrainingDraws, out: Path,
    advance: Callable[[int], None],
) -> tuple[dict[str, xr.Dataset], dict[str, np.ndarray]]:  # fmt: skip
    """Draw and write piece by piece everything with a dimension beside `population`; return what is small."""
    small: dict[str, list[xr.Dataset]] = {}
    new: dict[str, np.ndarray] = {}
    for p, rows in enumerate(pieces):
        drawn = _draw(fit, request, rows, training if p == 0 else None, advance)
        stored = drawn.compressed(p)
        new |= drawn.microenvironments
        groups = population_groups(fit, request.wanted.iloc[rows], request.given, stored)
        del drawn, stored
        for group, dataset in groups.items():
            large = [str(name) for name, values in dataset.data_vars.items() if values.ndim > 1]
            sizes = dict(dataset.sizes) | {"population": len(request.wanted), "map": len(pieces)}
            for name in large:
                axis, place = (
                    ("map", slice(p, p + 1)) if "map" in dataset[name].dims else ("population", rows)
                )
                write_rows(out, group, name, dataset[name].dims, dataset[name].values, sizes, axis, place)
            small.setdefault(group, []).append(dataset.drop_vars(large))
    return {group: xr.concat(parts, "population") for group, parts in small.items()}, new

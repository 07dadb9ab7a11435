"""Fit PerturbDiff to populations, and generate cells with it."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from rich.progress import Progress

from hilbertcell.data.perturbations import split_combination
from hilbertcell.data.populations import Keys, Populations
from hilbertcell.data.splits import Split, check_no_leak, check_same_data, labels_hash, training_mask
from hilbertcell.data.validation import DataError
from hilbertcell.inference.perturbdiff.cell_sets import CellSets, Expression, expression_of
from hilbertcell.inference.perturbdiff.generation import generate
from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings
from hilbertcell.inference.perturbdiff.training_run import Networks, Saving, train
from hilbertcell.inference.perturbdiff.vocabulary import Vocabulary, condition_labels
from hilbertcell.models.perturbdiff import init_covariate_encoder, init_denoiser, source_index
from hilbertcell.models.perturbdiff.layers import Affine
from hilbertcell.models.perturbdiff.state_dict import named_arrays


@dataclass(frozen=True, eq=False)
class PerturbDiffFit:
    """Trained networks with all that generation and further training need.

    Attributes:
        networks: denoiser and covariate encoder, weights averaged over training.
        current: the same, not averaged; None where a checkpoint had no such.
        keys: what the obs columns of the training file meant; None for a checkpoint that does not say.
        genes: (G,) names; None for a checkpoint, which holds none.
        vocabulary: ids of labels.
        unit: model units.
        settings: the settings it ran with.
        seed: the seed it ran with.
        split_hash: hash of the labels that the hold-out was made from, or None.
        held_out: names of the populations that training did not see.
        losses: (steps, 2) squared error and energy of every training step.
        origin: settings of the published checkpoint this was read from, to be written back; empty for a fit.

    """

    networks: Networks
    current: Networks | None
    keys: Keys | None
    genes: np.ndarray | None
    vocabulary: Vocabulary
    unit: Expression
    settings: PerturbDiffSettings
    seed: int = 0
    split_hash: str | None = None
    held_out: tuple[str, ...] = ()
    losses: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    origin: dict[str, Any] = field(default_factory=dict)

    def generate(
        self,
        populations: Populations,
        targets: pd.DataFrame,
        num_cells: np.ndarray,
        *,
        seed: int = 0,
        u: np.ndarray | None = None,
        **changes: Any,
    ) -> list[np.ndarray]:
        """Cells (n, G) of every target (T rows of labels), natural scale; see `generation.generate`.

        `populations` holds the controls; `changes` are settings of the sampler other than the fit's (`sampler`,
        `start_time`, `sample_steps`, `guidance`).

        Raises:
            DataError: the fit holds no genes, or other ones; a label it does not know; no controls.
            ValueError: changes that no sampler has.
        """
        if self.genes is None:
            raise DataError(
                "genes = None: this checkpoint does not say its genes; convert it again with --genes FILE, one name a line"
            )
        settings = self.settings.changed(**changes)
        controls = populations.match_genes(self.genes)
        return generate(
            self.networks, self.vocabulary, self.unit, settings, controls, targets, num_cells, seed, u
        )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the fit as a folder; see `storage.save_fit`."""
        from hilbertcell.inference.perturbdiff.storage import save_fit

        save_fit(self, Path(path), force=force)


def fit_perturbdiff(
    populations: Populations,
    *,
    holdout: Split | None = None,
    seed: int = 0,
    settings: PerturbDiffSettings | None = None,
    start: PerturbDiffFit | None = None,
    u: pd.DataFrame | None = None,
    resume: Path | None = None,
    progress: bool = False,
) -> PerturbDiffFit:
    """Train PerturbDiff on the populations that `holdout` does not hide.

    Args:
        populations: cells; perturbation features, if there are any, take the place of a learned perturbation table.
        holdout: what is hidden; where whole batches are, their controls are, too.
        seed: of weights, order of the cells, noise.
        settings: see `PerturbDiffSettings`.
        start: networks to begin with, such as `finetuning.prepare` makes; its vocabulary counts.
        u: microenvironment (K columns) of every batch or population, by name; makes the variant that can express a law.
        resume: file that keeps the state of the training; a training that was killed goes on from it.
        progress: whether to show a progress bar.

    Raises:
        DataError: too few cells for a step, or no controls where they are needed.
        LeakError: a hidden population reached training.
    """
    settings = settings or PerturbDiffSettings()
    train_on = populations
    if holdout is not None:
        check_same_data(holdout, populations.labels)
        train_on = populations.select(training_mask(holdout, populations.labels))
        check_no_leak(holdout, train_on.labels.index)
    labels, pretraining = train_on.labels, start is None and settings.drop_control == 1
    rows = None if u is None else microenvironments(u, labels)
    if start is None:
        features = None if pretraining else condition_features(train_on)
        vocabulary = Vocabulary.of(labels, perturbations=not pretraining, batches=settings.batch_covariate)
        if features is not None:
            vocabulary = replace(vocabulary, perturbation={name: i for i, name in enumerate(features.index)})
        networks = new_networks(
            seed, len(populations.genes), vocabulary, settings, features, 0 if rows is None else rows.shape[1]
        )
        unit = expression_of(train_on)
        if settings.start_at_mean:
            networks = at_mean(networks, unit.to_model(mean_cell(train_on)))
    else:
        vocabulary, networks, unit = start.vocabulary, start.networks, start.unit
    sets = CellSets(
        train_on, vocabulary, unit, settings.set_size, max(1, settings.cells_per_batch // settings.set_size),
        seed, settings.drop_control < 1, source_index(networks[0], settings.source or "") if settings.sources else None,
        rows,
    )  # fmt: skip
    fitted = PerturbDiffFit(
        networks, None, populations.keys, populations.genes, vocabulary, unit, settings, seed,
        holdout.labels_hash if holdout else None, holdout.held_out if holdout else (),
    )  # fmt: skip
    saving = (
        None if resume is None else Saving(resume, settings.checkpoint_every, fingerprint(fitted, labels))
    )
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("training", total=settings.max_steps)
        done = train(
            networks, sets, settings.recipe, seed, saving=saving, on_progress=lambda n: bar.advance(task, n)
        )
    return replace(fitted, networks=done.average, current=done.networks, losses=done.losses)


def new_networks(
    seed: int,
    num_genes: int,
    vocabulary: Vocabulary,
    settings: PerturbDiffSettings,
    features: pd.DataFrame | None = None,
    num_factors: int = 0,
) -> Networks:
    """Networks with the published initialisation; `features` (labels, F) as a given perturbation table."""
    key_denoiser, key_encoder = jax.random.split(jax.random.key(seed))
    make = eqx.filter_jit(init_denoiser)
    denoiser = make(
        key_denoiser, num_genes, hidden=settings.hidden, depth=settings.depth, num_heads=settings.num_heads,
        gene_features=settings.gene_features, sources=settings.sources, num_factors=num_factors,
    )  # fmt: skip
    encoder = init_covariate_encoder(
        key_encoder,
        num_genes,
        perturbations=len(vocabulary.perturbation) if features is None else features.to_numpy(np.float32),
        cell_types=len(vocabulary.context),
        batches=len(vocabulary.batch),
        hidden=settings.covariate_hidden,
    )
    return denoiser, encoder


def at_mean(networks: Networks, mean: np.ndarray) -> Networks:
    """The same networks with a main head that answers `mean` (G,), model units, whatever its input.

    A published head starts with random weights below a ReLU: a gene whose answer is negative for nearly every cell has next
    to no gradient, and may stay at zero for good.
    """
    denoiser, encoder = networks
    linear = Affine(jnp.zeros_like(denoiser.head.linear.weight), jnp.asarray(mean, jnp.float32))
    return eqx.tree_at(lambda d: d.head.linear, denoiser, linear), encoder


def mean_cell(populations: Populations) -> np.ndarray:
    """Mean (G,) over all cells, natural scale."""
    total = sum((rows.sum(axis=0) for _, rows in populations.chunks()), np.zeros(len(populations.genes)))
    return total / populations.num_cells


def condition_features(populations: Populations) -> pd.DataFrame | None:
    """Given table of conditions: features summed over the parts of a combination, the control row one scalar.

    The scalar is the mean of the whole table, as published. Every single perturbation that has features gets a row,
    so that one which training never saw can be asked for.
    """
    given = populations.perturbation_features
    if given is None:
        return None
    control, rows = populations.keys.control, {str(name): row for name, row in given.iterrows()}
    wanted = dict.fromkeys([*condition_labels(populations.labels), *rows])
    table = {
        name: sum(rows[part] for part in split_combination(name.partition(" @ ")[0]))
        for name in sorted(wanted)
        if name != control
    }
    table[control] = pd.Series(float(given.to_numpy().mean()), index=given.columns)
    return pd.DataFrame(table).T.sort_index()


def microenvironments(u: pd.DataFrame, labels: pd.DataFrame) -> np.ndarray:
    """Rows (P, K) of `u` for every population, by its name or else by its batch. Raises: DataError naming the absent."""
    names = labels.index if labels.index.isin(u.index).all() else pd.Index(labels["batch"])
    if absent := sorted(set(names) - set(u.index)):
        raise DataError(
            f"u = {len(u)} rows: none for {', '.join(absent[:5])}; give one row a batch or population"
        )
    return u.loc[names].to_numpy(np.float64)


def fingerprint(fitted: PerturbDiffFit, labels: pd.DataFrame) -> str:
    """What tells this training from others: settings, labels, genes, seed, first weights."""
    digest = hashlib.sha256()
    assert fitted.genes is not None
    settings = fitted.settings.model_dump(
        exclude={"checkpoint_every", "sampler", "start_time", "sample_steps", "guidance"}
    )
    for part in (
        settings,
        fitted.vocabulary.to_dict(),
        fitted.genes.tolist(),
        fitted.seed,
        labels_hash(labels),
    ):
        digest.update(json.dumps(part, sort_keys=True).encode())
    for name, array in named_arrays(*fitted.networks).items():
        digest.update(name.encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()

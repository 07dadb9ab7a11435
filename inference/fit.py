"""Fit a hidden-factor program to populations, and predict with it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr
from jax import Array
from rich.progress import Progress

from hilbertcell.data.moments import Moments, stream_moments
from hilbertcell.data.perturbations import PerturbationTable, perturbation_table
from hilbertcell.data.populations import Keys, Populations
from hilbertcell.data.splits import Split, check_no_leak, check_same_data
from hilbertcell.inference.diffusion_law import DiffusionLaw
from hilbertcell.inference.guides import BlockGuide
from hilbertcell.inference.law_choice import GAUSSIAN, LawChoice, choose_law
from hilbertcell.inference.nuts import INVARIANTS, choose_inference, run_nuts
from hilbertcell.inference.predictive import globals_sampler
from hilbertcell.inference.settings import Settings
from hilbertcell.inference.starting_values import starting_values
from hilbertcell.inference.svi import fit_svi, usual_steps
from hilbertcell.inference.tables import (
    ProgramTable,
    Standardisation,
    Vocabulary,
    condition_of,
    program_table,
    shrunken_covariance,
    vocabulary,
    within_codes,
)
from hilbertcell.models.effects import similarity_kernels
from hilbertcell.models.embedding import Coordinates, fit_coordinates
from hilbertcell.models.feature_maps import FeatureMap, fit_feature_map
from hilbertcell.models.hidden_factors import hidden_factor_program
from hilbertcell.models.microenvironment import Globals
from hilbertcell.models.within_covariance import WithinCovariance, WithinPrior, fit_loadings, fit_within_prior

# Above these, draws of NUTS are not to be trusted (Vehtari et al. 2021 ask for 1.01 of many long chains).
_MAX_RHAT = 1.05
_MAX_DIVERGING = 0.01


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted hidden-factor program with all that prediction needs; everything else is derived.

    Attributes:
        keys: what the obs columns of the training file meant.
        genes: (G,) names, in the order of the gene block.
        settings: the settings it ran with.
        seed: the seed it ran with.
        split_hash: hash of the labels that the hold-out was made from, or None.
        held_out: names of the populations that training did not see.
        feature_map, prior, coordinates: the embedding, fixed on training populations.
        scores_center: (D,) origin of the noise-factor scores.
        moments: streamed moments of the training populations.
        features: perturbation features given to the fit, or None.
        params: variational parameters; none where NUTS was used.
        losses: (steps,) negative ELBO, or other bound; none where NUTS was used.
        posterior: draws (chain, draw, ...) of the program's sites by NUTS; none where SVI was used.
        sampling: what NUTS says of itself: diverging, acceptance_rate, n_steps (chain, draw), rhat, ess (invariant).
        choice: the response law and why it is that one.
        diffusion: the trained denoiser where the law is the diffusion, else None.

    """

    keys: Keys
    genes: np.ndarray
    settings: Settings
    seed: int
    split_hash: str | None
    held_out: tuple[str, ...]
    feature_map: FeatureMap
    prior: WithinPrior
    coordinates: Coordinates
    scores_center: np.ndarray
    moments: Moments
    features: pd.DataFrame | None
    params: dict[str, np.ndarray]
    losses: np.ndarray
    posterior: dict[str, np.ndarray] = field(default_factory=dict)
    sampling: dict[str, np.ndarray] = field(default_factory=dict)
    choice: LawChoice = GAUSSIAN
    diffusion: DiffusionLaw | None = None

    @cached_property
    def names(self) -> Vocabulary:
        """Contexts and conditions that training saw."""
        return vocabulary(self.moments.labels)

    @cached_property
    def within(self) -> WithinCovariance:
        """Within-population covariances of the training populations."""
        return shrunken_covariance(self.moments, self.prior, self.names.contexts)

    @cached_property
    def unit(self) -> Standardisation:
        """Standardisation of the features: centre and total standard deviation of the training cells' classes."""
        total = self.prior.pooled_variance + self.moments.mean.var(axis=0)
        return Standardisation(self.moments.mean.mean(axis=0), np.sqrt(total))

    @cached_property
    def table(self) -> ProgramTable:
        """Training populations by batch."""
        return program_table(
            self.moments.labels, self.moments.mean, self.within.noise_variance, self.names, self.unit
        )

    @cached_property
    def perturbations(self) -> PerturbationTable:
        """Structure of the perturbations that training saw."""
        names = list(dict.fromkeys(perturbation for _, perturbation, _ in self.names.conditions))
        return perturbation_table(names, self.keys.control, features=self.features)

    @property
    def num_factors(self) -> int:
        """Upper bound on the factors: the setting, but at most one for every three batches beyond the first.

        Loadings of more factors are estimated from fewer batches than it takes to know them: the posterior of a
        variational fit is then too sure of them.
        """
        return min(self.settings.num_factors, (len(self.table.batches) - 1) // 3)

    @cached_property
    def program_args(self) -> tuple[Any, ...]:
        """Arguments of `hidden_factor_program` for the training populations."""
        kernels = similarity_kernels(self.names.structure(self.perturbations))
        stacked = jnp.asarray(np.stack(list(kernels.values())))
        observations = jax.tree.map(jnp.asarray, self.table.observations)
        block = (np.arange(self.feature_map.num_features) >= self.feature_map.num_genes).astype(int)
        return observations, stacked, self.names.level_index(), block, self.num_factors, observations.mean

    @property
    def inference(self) -> tuple[str, str]:
        """How it is learned, "svi" or "nuts", and why so."""
        return choose_inference(self.settings.inference, self.table.observations)

    @property
    def sample_stats(self) -> xr.Dataset:
        """The course of inference: `elbo` by step, or the statistics and diagnostics of the chains."""
        law = {} if self.diffusion is None else self.diffusion.sample_stats
        if not self.sampling:
            return xr.Dataset({"elbo": (("chain", "svi_step"), -self.losses[None]), **law})
        chains = {
            name: (("invariant",) if values.ndim == 1 else ("chain", "draw"), values)
            for name, values in self.sampling.items()
        }
        return xr.Dataset(chains | law, {"invariant": list(INVARIANTS)})

    @property
    def inference_notices(self) -> list[str]:
        """What a reader of predictions has to know of the inference: its choice, and chains that did not mix."""
        method, reason = self.inference
        notices = [] if reason == "as set" else [f"inference by {method}: {reason}"]
        if self.choice.reason != "as set":
            notices.append(f"response law: {self.choice.name}; {self.choice.reason}")
        if self.sampling:
            rhat, share = float(self.sampling["rhat"].max()), float(self.sampling["diverging"].mean())
            if rhat > _MAX_RHAT or share > _MAX_DIVERGING:
                notices.append(
                    f"NUTS has not converged: largest r-hat {rhat:.3f}, {share:.1%} of the draws diverged; fit with "
                    "another seed, or by svi"
                )
        return notices

    def guide(self) -> BlockGuide:
        """The variational family of the fit, starting from the observed effects."""
        initial, initial_sd = starting_values(self.program_args, self.seed)
        return BlockGuide(hidden_factor_program, *self.program_args, initial=initial, initial_sd=initial_sd)

    @cached_property
    def sample_globals(self) -> Callable[[Array], tuple[dict[str, Array], Globals]]:
        """Draws of the unknowns from the fitted family; compiled once. Call it where float64 is enabled."""
        return globals_sampler(self)

    def predict(
        self,
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
        """Draws of whole response distributions for the batches of `populations`; see `inference.draws.predict`."""
        from hilbertcell.inference.draws import predict

        return predict(
            self, populations, targets=targets, num_samples=num_samples, seed=seed, observe=observe,
            new_batch=new_batch, out=out, progress=progress,
        )  # fmt: skip

    def sample_cells(self, draws: xr.DataTree, populations: Populations, **options: Any) -> Any:
        """Predicted cells as AnnData; see `inference.cells.sample_cells`."""
        from hilbertcell.inference.cells import sample_cells

        return sample_cells(draws, populations, **options)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the fit as a folder; see `inference.checkpoints.save_fit`."""
        from hilbertcell.inference.checkpoints import save_fit

        save_fit(self, Path(path), force=force)

    def summarise(self, populations: Populations, *, progress: bool = False) -> Moments:
        """Moments of other populations under this fit's feature map (one streaming pass)."""
        return stream_moments(
            populations, self.feature_map, self.prior.scores, self.scores_center, progress=progress
        )


def load_fit(path: str | Path) -> Fit:
    """Read a fit that `Fit.save` wrote; see `inference.checkpoints.read_fit`."""
    from hilbertcell.inference.checkpoints import read_fit

    return read_fit(Path(path))


def fit(
    populations: Populations,
    *,
    holdout: Split | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    resume: Path | None = None,
    progress: bool = False,
) -> Fit:
    """Fit the hidden-factor program to the populations that `holdout` does not hide.

    `resume` names a file that holds what the pass over the cells has done so far, for cells that lie in a file: a fit
    that was interrupted goes on from there, to the same result. It is removed when the pass has ended. Files of the same
    name with an ending do so for the training of a diffusion.

    Batches all of whose perturbed populations are hidden are left out altogether: they stay new batches, whose
    controls are conditioned on at prediction.

    Raises:
        ValueError: fewer than two batches, no control or no perturbed population is left for training.
        LeakError: a hidden population reached training.
    """
    settings = settings or Settings()
    train = training_populations(populations, holdout)
    pilot, codes = train.pilot(settings.max_pilot_cells, seed)
    feature_map = fit_feature_map(pilot, settings.num_components, settings.num_random_features, seed)
    scores, center = fit_loadings(feature_map(pilot), codes, settings.noise_rank)
    moments = stream_moments(train, feature_map, scores, center, progress=progress, resume=resume)
    if holdout is not None:
        check_no_leak(holdout, moments.labels.index)
    names = vocabulary(moments.labels)
    classes = within_codes(moments.labels, names.contexts)
    prior = fit_within_prior(moments.n, moments.variance, moments.factor_covariance, classes, scores)
    coordinates = embed(moments, prior, names, settings.max_coordinates)
    start = Fit(
        populations.keys, populations.genes, settings, seed, holdout.labels_hash if holdout else None,
        holdout.held_out if holdout else (), feature_map, prior, coordinates, center, moments,
        populations.perturbation_features, {}, np.zeros(0),
    )  # fmt: skip
    fitted = infer(start, progress=progress)
    choice, diffusion = choose_law(fitted, resume)
    return replace(fitted, choice=choice, diffusion=diffusion)


def embed(moments: Moments, prior: WithinPrior, names: Vocabulary, max_coordinates: int) -> Coordinates:
    """Signal-ordered coordinates of the populations in `moments`; all of them are used."""
    conditions = pd.factorize(pd.Series(condition_of(moments.labels)))[0]
    within = shrunken_covariance(moments, prior, names.contexts)
    return fit_coordinates(moments.mean, within, prior, conditions, max_coordinates)


def infer(start: Fit, *, progress: bool = False) -> Fit:
    """Run inference for a fit whose embedding and moments are in place.

    Variational inference goes on from the parameters of `start` where it has some, of NumPyro's or of Pyro's making.
    """
    settings = start.settings
    key = jax.random.key(start.seed)
    if start.inference[0] == "nuts":
        with jax.enable_x64(True), Progress(transient=True, disable=not progress) as bar:
            bar.add_task("NUTS", total=None)
            initial, _ = starting_values(start.program_args, start.seed)
            sampled = run_nuts(key, start.program_args, initial)
        return replace(start, posterior=sampled.sites, sampling=sampled.stats)
    num_steps = settings.num_steps or usual_steps(start.table.observations)
    with jax.enable_x64(True), Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("inference", total=num_steps)
        advance: Callable[[int], None] = lambda steps: bar.advance(task, steps)
        result = fit_svi(
            key, hidden_factor_program, start.guide(), start.program_args,
            num_steps=num_steps, learning_rate=settings.learning_rate,
            num_particles=settings.num_particles, objective=settings.objective, params=start.params or None,
            on_progress=advance,
        )  # fmt: skip
        params = {name: np.asarray(value) for name, value in result.params.items()}
    return replace(start, params=params, losses=np.concatenate([start.losses, result.losses]))


def training_populations(populations: Populations, holdout: Split | None) -> Populations:
    """Populations left for training; see `fit`."""
    labels = populations.labels
    keep = np.ones(len(labels), dtype=bool)
    if holdout is not None:
        check_same_data(holdout, labels)
        keep = ~labels.index.isin([*holdout.held_out, *holdout.given])
        perturbed = ~labels["is_control"]
        had, has = set(labels["batch"][perturbed]), set(labels["batch"][perturbed & keep])
        keep &= ~labels["batch"].isin(had - has).to_numpy()
    left = labels[keep]
    if left["is_control"].all() or not left["is_control"].any() or left["batch"].nunique() < 2:
        raise ValueError(
            f"{len(left)} populations of {left['batch'].nunique()} batch(es), {int(left['is_control'].sum())} of them "
            "controls, are left for training; a fit needs controls, perturbed populations and two batches: hide less"
        )
    return populations.select(keep)

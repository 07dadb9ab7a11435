"""Faults planted into a small screen, its fit or its predictions, each beside the check that has to notice it.

The world: 12 donors x 2 tissues x (control, A, B), 12 genes of Poisson counts; a hidden condition of each donor moves baselines
and responses. Eight donors are fitted, four are predicted from their controls and judged on what was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import xarray as xr

from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import Populations
from hilbertcell.inference.fit import Fit, fit
from hilbertcell.inference.settings import Settings

KEYS = {"perturbation": "drug", "control": "DMSO", "context": "tissue", "batch": "donor"}
SETTINGS = Settings(num_random_features=0, num_factors=1)
NUM_TRAINING, NUM_HELD_OUT, NUM_GENES = 8, 4, 12
NUM_CELLS = 80  # of a population, on average


class Screen(NamedTuple):
    """Cells as counts: X (N, G), labels (N rows)."""

    counts: np.ndarray
    obs: pd.DataFrame


@dataclass(frozen=True)
class Examined:
    """What `diagnose` is given."""

    fit: Fit
    draws: xr.DataTree
    truth: Populations


def make_screen(seed: int = 0, *, library: float = 0.0, double: str = "") -> Screen:
    """The world. `library`: correlation of each donor's log library size with its hidden condition; `double`: a donor
    whose cells respond twice as strongly."""
    rng = np.random.default_rng(seed)
    base = rng.normal(3.0, 0.5, NUM_GENES)
    gamma, lam = rng.normal(0, 0.25, NUM_GENES), rng.normal(0, 0.2, NUM_GENES)
    effect = {
        "DMSO": np.zeros(NUM_GENES),
        "A": rng.normal(0, 0.6, NUM_GENES),
        "B": rng.normal(0, 0.4, NUM_GENES),
    }
    tissue_shift = rng.normal(0, 0.5, NUM_GENES)
    counts, rows = [], []
    for b in range(NUM_TRAINING + NUM_HELD_OUT):
        donor, u = f"d{b}", rng.standard_normal()
        depth = 0.4 * (library * u + np.sqrt(1 - library**2) * rng.standard_normal())
        own = gamma * u + rng.normal(0, 0.15, NUM_GENES)
        for tissue, shift in (("liver", 0.0), ("spleen", tissue_shift)):
            for drug, change in effect.items():
                number = int(rng.integers(NUM_CELLS // 2, 3 * NUM_CELLS // 2))
                response = (change + lam * u - 0.3 * own + rng.normal(0, 0.1, NUM_GENES)) * (drug != "DMSO")
                log_rate = base + shift + own + response * (2.0 if donor == double else 1.0)
                size = np.exp(depth + 0.2 * rng.standard_normal((number, 1)))
                counts.append(rng.poisson(size * np.exp(log_rate)).astype(np.float32))
                rows += [(drug, tissue, donor)] * number
    obs = pd.DataFrame(rows, columns=["drug", "tissue", "donor"], index=[f"c{i}" for i in range(len(rows))])
    return Screen(np.concatenate(counts), obs)


def read(screen: Screen, **options: Any) -> Populations:
    """A screen as populations; counts unless told otherwise."""
    var = pd.DataFrame(index=[f"g{g}" for g in range(screen.counts.shape[1])])
    data = anndata.AnnData(X=screen.counts, obs=screen.obs.copy(), var=var)
    return read_populations(data, **(KEYS | {"scale": "counts"} | options))


def split(screen: Screen) -> tuple[Screen, Screen]:
    """Training and held-out donors."""
    training = screen.obs["donor"].isin([f"d{b}" for b in range(NUM_TRAINING)]).to_numpy()
    return _select(screen, training), _select(screen, ~training)


def examined(training: Screen, held_out: Screen, *, seed: int = 0, **options: Any) -> Examined:
    """Fit the training donors and predict the others."""
    fitted = fit(read(training, **options), seed=seed, settings=SETTINGS)
    truth = read(held_out, **options)
    return Examined(fitted, fitted.predict(truth, num_samples=200, seed=seed), truth)


def honest(seed: int = 0) -> Examined:
    """The world without a fault."""
    return examined(*split(make_screen(seed)), seed=seed)


def _select(screen: Screen, mask: np.ndarray) -> Screen:
    return Screen(screen.counts[mask], screen.obs[mask])


def _renamed(screen: Screen, donor: str, name: str) -> Screen:
    """The cells of a donor under another name."""
    own = _select(screen, (screen.obs["donor"] == donor).to_numpy())
    obs = own.obs.assign(donor=name)
    return Screen(own.counts, obs.set_index("copy-" + obs.index))


def _joined(first: Screen, second: Screen) -> Screen:
    return Screen(np.concatenate([first.counts, second.counts]), pd.concat([first.obs, second.obs]))


def duplicated(screen: Screen, donor: str = "d6", instead_of: str = "d7") -> Screen:
    """A donor twice, the second time in the place of another."""
    kept = _select(screen, (screen.obs["donor"] != instead_of).to_numpy())
    return _joined(kept, _renamed(screen, donor, instead_of))


def swapped(screen: Screen, donor: str = "d3") -> Screen:
    """Controls and cells under A of one donor exchange labels."""
    own = (screen.obs["donor"] == donor).to_numpy()
    exchanged = screen.obs["drug"].replace({"DMSO": "A", "A": "DMSO"})
    return Screen(screen.counts, screen.obs.assign(drug=screen.obs["drug"].where(~own, exchanged)))


def shuffled(screen: Screen, seed: int = 0) -> Screen:
    """Donors of cells are exchanged within (tissue, drug)."""
    rng = np.random.default_rng(seed)
    moved = screen.obs.groupby(["tissue", "drug"])["donor"].transform(lambda x: rng.permutation(x.to_numpy()))
    return Screen(screen.counts, screen.obs.assign(donor=moved))


def logged(screen: Screen, except_for: str = "") -> Screen:
    """log1p of counts per 10,000, but for one donor whose counts stay as they are."""
    total = screen.counts.sum(1, keepdims=True)
    values = np.log1p(1e4 * screen.counts / total)
    raw = (screen.obs["donor"] == except_for).to_numpy()[:, None]
    return Screen(np.where(raw, screen.counts, values).astype(np.float32), screen.obs)


def shifted_guide(fitted: Fit, by: float = 1.0) -> Fit:
    """Every unknown of a feature moved by `by` sds of the guide."""
    sd = np.linalg.norm(fitted.params["feature_tril"], axis=2)
    wide = fitted.params["feature_sd"]
    location = fitted.params["feature_loc"] + by * np.concatenate([sd, wide], axis=1)
    return replace(fitted, params=fitted.params | {"feature_loc": location})


def scaled_guide(fitted: Fit, by: float) -> Fit:
    """All widths of the guide multiplied."""
    widths = ("shared_tril", "feature_tril", "feature_sd", "feature_common")
    return replace(
        fitted, params={name: by * x if name in widths else x for name, x in fitted.params.items()}
    )


def scaled_draws(draws: xr.DataTree, *, effect: float = 1.0, spread: float = 1.0) -> xr.DataTree:
    """Predictions with the response, or the spread around its mean, multiplied."""
    tree = draws.copy()
    predictions = tree["predictions"].to_dataset()
    control = predictions["mean"] - predictions["shift"]
    mean = control + effect * predictions["shift"]
    middle = mean.mean(("chain", "draw"))
    mean = middle + spread * (mean - middle)
    tree["predictions"] = xr.DataTree(predictions.assign(mean=mean, shift=mean - control))
    return tree


@dataclass(frozen=True)
class Fault:
    """A planted fault: how to make it of the honest world, and the checks of which one at least has to raise an alarm."""

    make: Callable[[Examined], Examined]
    expected: tuple[str, ...]


def leaky(training: Screen) -> Screen:
    """With the cells of a held-out donor under another name."""
    return _joined(training, _renamed(split(make_screen())[1], "d9", "e9"))


def _refitted(change: Callable[[Screen], Screen]) -> Callable[[Examined], Examined]:
    def make(_: Examined) -> Examined:
        training, held_out = split(make_screen())
        return examined(change(training), held_out)

    return make


def library_world(_: Examined) -> Examined:
    """Donors whose hidden condition is their library size."""
    return examined(*split(make_screen(library=0.99)))


def _doubled_donor(_: Examined) -> Examined:
    return examined(*split(make_screen(double="d3")))


def _one_raw(_: Examined) -> Examined:
    training, held_out = split(make_screen())
    return examined(logged(training, except_for="d3"), logged(held_out), scale="log1p")


FAULTS: dict[str, Fault] = {
    "biased guide": Fault(lambda w: replace(w, fit=shifted_guide(w.fit)), ("guide_location",)),
    "under-dispersed posterior": Fault(lambda w: replace(w, fit=scaled_guide(w.fit, 0.5)), ("guide_width",)),
    "over-dispersed posterior": Fault(lambda w: replace(w, fit=scaled_guide(w.fit, 2.0)), ("guide_width",)),
    "leaked split": Fault(_refitted(leaky), ("leak",)),
    "control and perturbed swapped in one donor": Fault(_refitted(swapped), ("response",)),
    "batch labels shuffled": Fault(_refitted(shuffled), ("labels",)),
    "effect doubled in one donor": Fault(_doubled_donor, ("response",)),
    "effect doubled in predictions": Fault(
        lambda w: replace(w, draws=scaled_draws(w.draws, effect=2.0)), ("strength",)
    ),
    "variance of predictions shrunken": Fault(
        lambda w: replace(w, draws=scaled_draws(w.draws, spread=0.2)), ("cover", "pit")
    ),
    "one donor on another scale": Fault(_one_raw, ("scale",)),
    "duplicated donor": Fault(_refitted(duplicated), ("copies",)),
    "factor is library size": Fault(library_world, ("technical",)),
}

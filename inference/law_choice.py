"""Which response law a fit gets: the program's Gaussian one, the diffusion around it, or what held-out batches prefer.

`auto` leaves out a quarter of the batches, fits the program and trains the network on the rest, and compares the two laws
of the left-out perturbed populations given their controls. The program's density of a batch is multiplied by

    p_D(perturbed | controls) / p_G(perturbed | controls) = E[ prod_j p_D(v_hat_j | latents) / p_G(v_hat_j | latents) ]

under the latents' posterior given all of the batch, and the log of the right side is at least the mean of the terms that
`score_matching.elbo_correction` adds. So the difference reported is a lower bound on what the diffusion gains: in all
features, since what the coordinates leave out is drawn from the program in both laws, and at the same noise, sigma_j.
The diffusion is taken where it wins by the one-sided paired t test over batches at 5 %; a tie is the program's.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
import pandas as pd

from hilbertcell.inference.diffusion_law import (
    DiffusionLaw,
    held_out_batches,
    see_populations,
    train_law,
)
from hilbertcell.inference.paired_test import MIN_BATCHES, p_greater
from hilbertcell.inference.score_matching import corrections
from hilbertcell.inference.tables import Vocabulary, condition_of, vocabulary

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

_JUDGED = 0.25  # share of the batches that judge
_MIN_TRAINING = 8  # batches beside the judging ones: below, no network is to be learned from them
_LEVEL = 0.05


@dataclass(frozen=True)
class LawChoice:
    """The law of a fit and why.

    Attributes:
        name: "gaussian" or "diffusion".
        reason: "as set", or what `auto` found.
        gains: bound on the gain in log density of the diffusion, nats, by judging batch.

    """

    name: str
    reason: str
    gains: dict[str, float]


GAUSSIAN = LawChoice("gaussian", "as set", {})


def choose_law(fit: "Fit", resume: Path | None = None) -> tuple[LawChoice, DiffusionLaw | None]:
    """The law that the settings of a fitted program ask for, trained where it is the diffusion.

    Files named after `resume` keep the state of a training, see `denoiser_training.train`.
    """
    wanted = fit.settings.law
    if wanted == "gaussian":
        return GAUSSIAN, None
    if wanted == "auto":
        gains, why_not = judge_laws(fit, _beside(resume, "judged"))
        if why_not:
            return LawChoice("gaussian", why_not, gains), None
        reason = _reason(gains)
        if p_greater(np.array(list(gains.values()))) >= _LEVEL:
            return LawChoice("gaussian", reason, gains), None
    else:
        gains, reason = {}, "as set"
    law = train_law(fit, seed=fit.seed, resume=_beside(resume, "law"))
    if law.is_program:
        return LawChoice("gaussian", "the network gained nothing on held-out batches", gains), None
    return LawChoice("diffusion", reason, gains), law


def _beside(path: Path | None, kind: str) -> Path | None:
    return None if path is None else path.with_name(f"{path.name}.{kind}")


def judge_laws(fit: "Fit", resume: Path | None = None) -> tuple[dict[str, float], str]:
    """Gains of the diffusion on batches left out, and why there is nothing to choose ("" if there is)."""
    from hilbertcell.inference.fit import embed, infer  # fit.py needs this file

    labels = fit.moments.labels
    batches = labels["batch"].to_numpy()
    number = len(np.unique(batches[~labels["is_control"].to_numpy()]))
    if number < MIN_BATCHES + _MIN_TRAINING:
        return (
            {},
            f"{number} batches with perturbed populations: {MIN_BATCHES + _MIN_TRAINING} are needed to choose",
        )
    judging = held_out_batches(batches, max(_JUDGED, MIN_BATCHES / len(np.unique(batches))), fit.seed)
    moments = fit.moments.select(~judging)
    names = vocabulary(moments.labels)
    if set(names.contexts) != set(fit.names.contexts):
        return {}, "some contexts are in the judging batches alone"
    coordinates = embed(moments, fit.prior, names, fit.settings.max_coordinates)
    inner = infer(
        replace(fit, moments=moments, coordinates=coordinates, params={}, posterior={}, sampling={})
    )
    law = train_law(inner, seed=fit.seed, resume=resume)
    if law.is_program:
        return {}, "the network gained nothing on held-out batches"
    judged = fit.moments.select(judging & _known(labels, names))
    seen, _ = see_populations(inner, judged, fit.seed, law.description)
    gains = np.asarray(corrections(jax.random.key(fit.seed), law.denoiser, *seen[1:])).mean(0)
    return {str(batch): float(gains[seen.batch == batch].sum()) for batch in np.unique(seen.batch)}, ""


def _known(labels: pd.DataFrame, names: Vocabulary) -> np.ndarray:
    """(P,) bool: controls, and perturbed populations whose condition is among `names`."""
    conditions = set(names.conditions)
    return labels["is_control"].to_numpy() | np.array([c in conditions for c in condition_of(labels)])


def _reason(gains: dict[str, float]) -> str:
    values = np.array(list(gains.values()))
    return (
        f"the diffusion gains {values.mean():.2f} nats a batch or more (p = {p_greater(values):.3f}, {len(values)} "
        "held-out batches)"
    )

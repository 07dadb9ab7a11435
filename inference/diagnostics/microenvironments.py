"""What is known of the microenvironment, and whether it is only another name for something technical."""

from itertools import permutations
from math import factorial

import numpy as np

from hilbertcell.inference.diagnostics.result import Result, judged

_MAX_PERMUTATIONS = 5040  # of seven batches all; of more a random sample
WEAK = 0.2  # contraction below which a factor is mostly its prior


def contraction(draws: np.ndarray) -> np.ndarray:
    """How much data narrowed each factor, 1 - posterior / prior variance, mean over batches: (K,) of aligned draws (S, B, K).

    The prior variance is 1. Orientation must be common to all draws (`inference.predictive.align`).
    """
    return 1.0 - draws.var(0, ddof=1).mean(0)


def known_factors(draws: np.ndarray) -> Result:
    """Smallest contraction over factors of aligned draws (S, B, K). A threshold, no test: never more than "watch"."""
    found = contraction(draws)
    if not len(found):
        return Result(float("nan"), None, "ok")
    details = {f"factor {k}": float(value) for k, value in enumerate(found)}
    weak = found.min() < WEAK
    return Result(
        float(found.min()),
        None,
        "watch" if weak else "ok",
        f"factor {found.argmin()}" if weak else "",
        details,
    )


def explained_by(
    factors: np.ndarray, covariates: np.ndarray, names: tuple[str, ...], rng: np.random.Generator
) -> Result:
    """Do the factors follow something technical? Share of a covariate's variance between batches that they explain.

    R^2 of each covariate regressed on all factors, which no rotation of the factors changes. Null: batches are exchangeable
    with respect to the covariates; all permutations of up to seven batches, else 5,039 random ones; the largest R^2 of
    each permutation corrects for the number of covariates (Westfall and Young 1993). The smallest possible p-value is
    1 / B!, so that four batches can never raise an alarm.

    Args:
        factors: (B, K) posterior means of the microenvironment, K < B - 1.
        covariates: (B, M), one value a batch.
        names: of the covariates (M,).
        rng: draws the permutations.
    """
    num = len(factors)
    if factors.shape[1] == 0 or not len(names):
        return Result(0.0, None, "ok")
    basis = np.linalg.qr(factors - factors.mean(0))[0]
    unit = covariates - covariates.mean(0)
    unit = unit / np.linalg.norm(unit, axis=0)
    if factorial(num) <= _MAX_PERMUTATIONS:
        orders = np.array(list(permutations(range(num))))
    else:
        orders = np.array([np.arange(num), *(rng.permutation(num) for _ in range(_MAX_PERMUTATIONS - 1))])
    share = (np.einsum("bk,rbm->rkm", basis, unit[orders]) ** 2).sum(1)  # (R, M), the identity first
    found, null = share[0], share.max(1)
    p = (null >= found.max() - 1e-12).mean()
    details = {name: float(value) for name, value in zip(names, found, strict=True)}
    return judged(found.max(), p, names[int(found.argmax())], details)

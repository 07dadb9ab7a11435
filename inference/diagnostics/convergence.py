"""Has inference ended where it should? The course of the bound, chains of NUTS, gradients and weights of the guide.

At an optimum of the ELBO the expected gradient is zero. Per unknown, in units of the guide's own sd, the gradient with
respect to the location is how many posterior sds the guide lies from its optimum (exact for a Gaussian posterior), and that
with respect to the width says how much too wide or too narrow it is. Both are compared with what is tolerable, so that the
null is "at most as far as this", and its level is reached at that distance.
"""

import numpy as np
from arviz_stats.base import array_stats
from scipy.stats import mannwhitneyu, norm
from scipy.stats import t as student_t

from hilbertcell.inference.diagnostics.result import Result, Verdict, judged

# Of the course of the bound, the last tenth is compared with the tenth before; each in so many blocks of means.
_WINDOW, _BLOCKS = 0.1, 10
DISTANCE = 0.3  # root mean square distance of the guide's locations from the optimum, posterior sds
# A gain of the bound is a loss of divergence, and this is what so much distance costs, nats per unknown. The decay of the
# step size alone, which calms the parameters down, gains about half of it.
DRIFT = DISTANCE**2 / 2
WIDTHS = (0.8, 1.25)  # sd of the guide over that at the optimum
_TOO_WIDE = 10.0
MAX_RHAT, MIN_ESS, MAX_DIVERGING = 1.05, 400.0, 0.01
GOOD_K = 0.7


def bound_drift(losses: np.ndarray, num_unknowns: int) -> Result:
    """Does the bound still rise? Gain of the last tenth of the steps over the tenth before, nats per unknown.

    Null: the gain is `DRIFT` at most; a rank test of block means of the losses (steps,), whose noise may have any law.
    """
    length = int(len(losses) * _WINDOW)
    if length < _BLOCKS:
        return Result(float("nan"), None, "watch", details={"steps": float(len(losses))})
    before, last = (
        part[: length // _BLOCKS * _BLOCKS].reshape(_BLOCKS, -1).mean(1) / num_unknowns
        for part in (losses[-2 * length : -length], losses[-length:])
    )
    p = mannwhitneyu(before - DRIFT, last, alternative="greater", method="exact").pvalue
    return judged(before.mean() - last.mean(), p)


def chains(rhat: np.ndarray, ess: np.ndarray, diverging: np.ndarray, names: tuple[str, ...]) -> Result:
    """Have chains mixed? Largest r-hat (Q,), smallest effective sample size (Q,) of invariants, share diverging.

    Thresholds, no test: Vehtari et al. (2021) ask for 1.01 of many long chains; `MAX_RHAT` allows for four short ones.
    """
    worst, share = int(np.argmax(rhat)), float(np.mean(diverging))
    bad = rhat[worst] > MAX_RHAT or share > MAX_DIVERGING
    few = ess.min() < MIN_ESS
    details = {"smallest ess": float(ess.min()), "share diverging": share}
    verdict: Verdict = "alarm" if bad else "watch" if few else "ok"
    return Result(float(rhat[worst]), None, verdict, names[worst] if bad else "", details)


def guide_location(score: np.ndarray) -> Result:
    """Does the guide lie where the posterior does? Root mean square distance from the optimum, posterior sds.

    Args:
        score: (S, Q) gradients of log density minus log guide, one row a draw of the guide, each entry with respect
            to a shift of one of Q unknowns by one sd of the guide.
    """
    mean = score.mean(0)
    excess = (mean**2 - score.var(0, ddof=1) / len(score)).mean()
    # Jackknife over draws: of the unbiased square, which is a U-statistic, the leave-one-out values in closed form.
    number = len(score)
    total = score.sum(0)
    pairs = (total**2).mean() - (score**2).mean(1).sum()
    left_out = (pairs - 2 * (score @ total / score.shape[1] - (score**2).mean(1))) / (
        (number - 1) * (number - 2)
    )
    error = np.sqrt((number - 1) * left_out.var())
    p = norm.sf((excess - DISTANCE**2) / max(error, 1e-300))
    return judged(np.sqrt(max(excess, 0.0)), p)


def guide_width(ratio: np.ndarray) -> Result:
    """Is the guide as wide as the posterior around it? Its sd over that of the optimum, root mean square over unknowns.

    Null: the mean ratio lies within the squares of `WIDTHS`; t test over draws. Of a guide that is too wide some draws lie where
    the density of the program falls off exponentially: ratios count as `_TOO_WIDE` at most.

    Args:
        ratio: (S,) per draw of the guide, minus the mean over unknowns of (white noise x gradient with respect to it):
            its expectation is the mean square of the guide's sd over the optimal one.
    """
    ratio = np.clip(np.nan_to_num(ratio, nan=np.inf), 0.0, _TOO_WIDE)
    low, high = (bound**2 for bound in WIDTHS)
    mean, error = ratio.mean(), max(ratio.std(ddof=1) / np.sqrt(len(ratio)), 1e-12)
    tail = student_t.sf if mean > 1 else student_t.cdf
    p = tail((mean - (high if mean > 1 else low)) / error, len(ratio) - 1)
    return judged(np.sqrt(mean), p)


def importance_tail(log_ratio: np.ndarray, num_unknowns: int) -> Result:
    """Could draws of the guide be reweighted into draws of the posterior? Pareto k of (S,) log ratios.

    Vehtari et al. (2024), Yao et al. (2018): above `GOOD_K` they could not. With hundreds of unknowns that is the rule
    for any Gaussian guide, and says little of predictions: never more than "watch".
    """
    if not np.isfinite(log_ratio).all():
        k = float("inf")
    elif np.ptp(log_ratio) < 1e-9:
        k = 0.0  # the guide is the posterior, and there is no tail
    else:
        k = float(array_stats.psislw(-log_ratio)[1])  # takes log likelihoods: weights are their inverses
    return Result(k, None, "watch" if not k <= GOOD_K else "ok", details={"unknowns": float(num_unknowns)})

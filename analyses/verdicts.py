"""What may be concluded from the scores of a few batches: the unit of replication is the batch, never the cell.

All arrays are (B,), one mean score per held-out batch, and all scores are better when smaller (give a precision
with its sign changed). The same rules serve every table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hilbertcell.inference.paired_test import p_greater


@dataclass(frozen=True)
class Verdict:
    """How a model stands against one baseline on one score.

    Attributes:
        outcome: "loses", "undecided" or "wins".
        difference: mean over batches of score(model) - score(baseline); negative is better.
        p_loses, p_wins: one-sided p-values of the paired t test, Holm-adjusted over the baselines.

    """

    outcome: Literal["loses", "undecided", "wins"]
    difference: float
    p_loses: float
    p_wins: float


def verdicts(
    model: np.ndarray, baselines: Mapping[str, np.ndarray], level: float = 0.05
) -> dict[str, Verdict]:
    """Paired t test over batches of one model against each baseline, Holm-adjusted over the baselines.

    The model 'loses' where the mean of its paired differences exceeds t(1 - level, B - 1) sd / sqrt(B), and
    'wins' where the reverse holds; with fewer than four batches everything is 'undecided'.
    """
    names = list(baselines)
    differences = [_paired(model, baselines[name], name) for name in names]
    p_loses = _holm(np.array([p_greater(difference) for difference in differences]))
    p_wins = _holm(np.array([p_greater(-difference) for difference in differences]))
    outcomes: list[Literal["loses", "undecided", "wins"]] = [
        "loses" if loses < level else "wins" if wins < level else "undecided"
        for loses, wins in zip(p_loses, p_wins, strict=True)
    ]
    return {
        name: Verdict(outcome, float(difference.mean()), float(loses), float(wins))
        for name, outcome, difference, loses, wins in zip(
            names, outcomes, differences, p_loses, p_wins, strict=True
        )
    }


def jackknife_ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """Ratio of the means over batches and its jackknife standard error, leaving out one batch at a time.

    Efron and Stein (1981), Ann. Stat. 9. The error is nan with one batch.
    """
    _paired(numerator, denominator, "the denominator")
    ratio = float(numerator.sum() / denominator.sum())
    num_batches = len(numerator)
    if num_batches < 2:
        return ratio, float("nan")
    without = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    return ratio, float(np.sqrt((num_batches - 1) * np.mean((without - without.mean()) ** 2)))


def bootstrap_ratio_upper(
    numerator: np.ndarray,
    denominator: np.ndarray,
    rng: np.random.Generator,
    level: float = 0.9,
    num_resamples: int = 10_000,
) -> float:
    """One-sided upper bound of the ratio of means over batches: paired percentile bootstrap, batches resampled together.

    Efron and Tibshirani (1993), ch. 13. Below 1: smaller than the denominator at this confidence; with six batches
    it is a rough bound.
    """
    _paired(numerator, denominator, "the denominator")
    chosen = rng.integers(len(numerator), size=(num_resamples, len(numerator)))
    return float(np.quantile(numerator[chosen].sum(1) / denominator[chosen].sum(1), level))


def _paired(model: np.ndarray, baseline: np.ndarray, name: str) -> np.ndarray:
    if model.shape != baseline.shape or model.ndim != 1 or not len(model):
        raise ValueError(
            f"scores per batch must be two equal (B,), got {model.shape} and {baseline.shape} for {name}"
        )
    if not (np.isfinite(model).all() and np.isfinite(baseline).all()):
        raise ValueError(
            f"a score per batch against {name} is missing; compare on the batches that both have"
        )
    return model - baseline


def _holm(pvalue: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment (Holm 1979, Scand. J. Stat. 6): adjusted p-values, same order."""
    order = np.argsort(pvalue)
    steps = np.minimum(pvalue[order] * np.arange(len(pvalue), 0, -1), 1.0)
    adjusted = np.empty_like(pvalue)
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted

"""Do predictions of batches that training did not see keep their promise? Batches are the unit of replication.

Populations and genes of one batch hang together, in ways that no program knows in full; so every batch gives one number for
each question, and the mean over batches is measured by its standard error over batches. The null law of this t statistic
comes from draws of the law in the place of the truth, one of each batch: exact if the law is right, whatever the shape of
the numbers' distribution, and little moved by a dependence between genes that the law has too weak, since that widens numerator and
denominator alike. Folds of a cross-validation share training batches, which is left out of account.

From three batches or fewer a standard error says nothing. Then the mean itself is ranked among those of draws, which takes the
law's dependence for granted: never more than "watch".
"""

from typing import NamedTuple

import numpy as np

from hilbertcell.inference.diagnostics.result import Result, judged, monte_carlo_p
from hilbertcell.inference.paired_test import MIN_BATCHES

_NULL_AVERAGES = 9_999
LEVEL = 0.9


class HeldOut(NamedTuple):
    """One batch that training did not see; T populations, G genes, one unit for all."""

    batch: str
    truth: np.ndarray  # (T, G) observed means
    draws: np.ndarray  # (S, T, G) draws of what would be observed: noise of the truth's cells added
    control: np.ndarray  # (T, G) observed means of the controls of each population


class Scores(NamedTuple):
    """One number per question: of the truth first, then of each draw as if it were the truth, (S + 1,)."""

    cover: np.ndarray  # share of the means in their 90 % interval; should be 0.9
    place: np.ndarray  # mean of their probability integral transforms; 0.5
    spread: np.ndarray  # mean distance of these from 1/2, times 4; 1, below: law too wide, above: too narrow
    strength: np.ndarray  # slope of responses on predicted ones; 1


EXPECTED = Scores(np.array(LEVEL), np.array(0.5), np.array(1.0), np.array(1.0))


def score(held: HeldOut) -> Scores:
    """Scores of one batch."""
    pooled = np.concatenate([held.truth[None], held.draws]).reshape(len(held.draws) + 1, -1)
    transform = (np.argsort(np.argsort(pooled, axis=0), axis=0) + 0.5) / len(pooled)
    tail = (1 - LEVEL) / 2
    control = held.control.ravel()
    predicted = pooled[1:].mean(0) - control
    return Scores(
        ((transform > tail) & (transform < 1 - tail)).mean(1),
        transform.mean(1),
        4 * np.abs(transform - 0.5).mean(1),
        (pooled - control) @ predicted / max(float(predicted @ predicted), 1e-300),
    )


def held_out_checks(held: list[HeldOut], rng: np.random.Generator) -> dict[str, Result]:
    """Cover, PIT (place and spread, Holm) and strength of the response of held-out batches."""
    scores = [score(h) for h in held]
    names = [h.batch for h in held]
    few = len(held) < MIN_BATCHES

    def p_of(values: list[np.ndarray], expected: float) -> float:
        null = np.stack([v[rng.integers(1, len(v), _NULL_AVERAGES)] for v in values], axis=-1)
        every = np.concatenate([[[v[0] for v in values]], null]) - expected
        if few:
            mean = every.mean(1)
            return monte_carlo_p(float(mean[0]), mean[1:], "two-sided")
        error = np.maximum(every.std(1, ddof=1), 1e-12)
        t = np.abs(every.mean(1)) / error
        return monte_carlo_p(float(t[0]), t[1:])

    def result(field: int, p: float) -> Result:
        by_batch = {name: float(s[field][0]) for name, s in zip(names, scores, strict=True)}
        found = judged(float(np.mean(list(by_batch.values()))), p, details=by_batch)
        if few and found.verdict == "alarm":
            return Result(found.statistic, p, "watch", details=by_batch)
        return found

    p = [p_of([s[i] for s in scores], float(EXPECTED[i])) for i in range(len(EXPECTED))]
    return {
        "cover": result(0, p[0]),
        "pit": result(1 if p[1] < p[2] else 2, min(1.0, 2 * min(p[1:3]))),
        "strength": result(3, p[3]),
    }


def pit_values(held: list[HeldOut]) -> np.ndarray:
    """Probability integral transforms of all means of all batches, flat."""
    return np.concatenate([((h.draws < h.truth).sum(0) + 0.5).ravel() / (len(h.draws) + 1) for h in held])

"""What a check returns, and how a p-value becomes a verdict."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Verdict = Literal["ok", "watch", "alarm"]
Side = Literal["greater", "less", "two-sided"]
ALARM, WATCH = 0.01, 0.05  # nominal levels of the two verdicts


@dataclass(frozen=True)
class Result:
    """Outcome of one check.

    Attributes:
        statistic: what was measured; the check says in which unit.
        p: p-value under the null law of the check; None where thresholds decide.
        verdict: "ok", "watch" or "alarm".
        culprit: the batch, factor or quantity that stands out, "" where none does.
        details: more numbers by name, for tables and files.

    """

    statistic: float
    p: float | None
    verdict: Verdict
    culprit: str = ""
    details: dict[str, float] = field(default_factory=dict)


def verdict_of(p: float) -> Verdict:
    """Alarm up to 1 %, watch up to 5 %; a p-value that is not a number is an alarm."""
    return "ok" if p > WATCH else "watch" if p > ALARM else "alarm"


def judged(statistic: float, p: float, culprit: str = "", details: dict[str, float] | None = None) -> Result:
    """A result whose verdict follows from its p-value."""
    return Result(float(statistic), float(p), verdict_of(p), culprit, details or {})


def monte_carlo_p(observed: float, null: np.ndarray, side: Side = "greater") -> float:
    """P-value of a statistic among R draws (R,) of its null law: (1 + as extreme) / (1 + R), exact for exchangeable draws.

    Davison and Hinkley (1997), section 4.2. Two-sided: twice the smaller one.
    """
    greater = (1 + (null >= observed).sum()) / (1 + len(null))
    less = (1 + (null <= observed).sum()) / (1 + len(null))
    return float({"greater": greater, "less": less, "two-sided": min(1.0, 2 * min(greater, less))}[side])

"""The rule behind every 'not worse than': a one-sided paired t test over batches, the unit of replication."""

import numpy as np
from scipy.stats import t as student_t

MIN_BATCHES = 4  # with three or fewer a paired t test over batches has no power worth the name


def p_greater(difference: np.ndarray) -> float:
    """One-sided p-value that the mean of paired differences (B,), one per batch, is greater than 0; 1 below 4 batches."""
    num_batches = len(difference)
    if num_batches < MIN_BATCHES:
        return 1.0
    error = difference.std(ddof=1) / np.sqrt(num_batches)
    if error == 0:  # the same difference in every batch
        return 0.0 if difference[0] > 0 else 1.0
    return float(student_t.sf(difference.mean() / error, num_batches - 1))

"""Transport of continuous measurements: each feature is moved by the monotone map between two normal laws."""

import numpy as np


def transport_continuous(cells: np.ndarray, target_mean: np.ndarray, sd_log_ratio: np.ndarray) -> np.ndarray:
    """Move cells (n, G) so that their means are `target_mean` (G,) and their sds scale by `exp(sd_log_ratio)` (G,).

    The optimal transport between normal laws of one feature, x -> target + ratio (x - mean): order and ranks of the cells
    are kept, so co-expression is. Units are those of the data. One cell becomes the target mean.
    """
    mean = cells.mean(axis=0)
    return target_mean + np.exp(sd_log_ratio) * (cells - mean)

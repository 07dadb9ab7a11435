"""Linear predictors of the shift from the controls: additive in context and perturbation, and ridge.

As in `baselines`: draws (S, T, G) of the absolute latent mean of T targets on the scale of the data, `given controls +
predicted shift`, with the noise of the given controls and a Gaussian residual whose variance is freed of sampling noise.
"""

import numpy as np

from hilbertcell.models.baselines import Shifts, Targets, TrainingTable, paired_shifts

PENALTIES = 10.0 ** np.arange(-3, 4)  # both blocks of inputs have total variance 1
MAX_COMPONENTS = 10  # of the control means: more than a screen of tens of populations can tell apart


def additive(table: TrainingTable, targets: Targets, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Shift = mean + effect of the context + effect of the condition, least squares over training populations.

    A context or condition that was not seen has the mean effect. The residual variance has the degrees of freedom
    of the fit and is widened by the leverage of the target. Norman-style additive model of Ahlmann-Eltze et al.
    (2025), Nat. Methods 22, for contexts in place of second perturbations. Raises: ValueError without training pairs.
    """
    shifts = _known_shifts(table)
    design = np.hstack(
        [_one_hot(shifts.context, shifts.context), _one_hot(shifts.condition, shifts.condition)]
    )
    wanted = np.hstack(
        [_one_hot(targets.context, shifts.context), _one_hot(targets.condition, shifts.condition)]
    )
    mean = shifts.shift.mean(0)
    inverse = np.linalg.pinv(design)
    coefficients = inverse @ (shifts.shift - mean)
    free = len(design) - 1 - np.linalg.matrix_rank(design)
    observed, between = np.zeros_like(mean), np.zeros_like(mean)
    if free > 0:  # else every shift is fitted exactly: nothing says how batches differ
        observed = np.square(shifts.shift - mean - design @ coefficients).sum(0) / free
        between = np.maximum(observed - (shifts.noise + shifts.control_noise).mean(0), 0.0)
    leverage = 1 / len(design) + np.square(wanted @ inverse).sum(1)
    variance = between + observed * leverage[:, None]  # the effects were fitted to noisy means
    return _around_controls(targets, mean + wanted @ coefficients, variance, num_draws, rng)


def ridge(
    table: TrainingTable,
    targets: Targets,
    num_draws: int,
    rng: np.random.Generator,
    features: np.ndarray,
) -> np.ndarray:
    """Ridge regression of the shift on principal components of the own control means and features of the condition.

    `features` (K, F) has a row per condition code; a row that is not finite counts as the mean of the training
    conditions. The penalty is chosen, and the residual variance measured, by leaving out one training batch after the
    other (variance 0 and penalty 1 with one batch). Raises: ValueError without training pairs.
    """
    shifts = _known_shifts(table)
    center = shifts.control_mean.mean(0)
    _, _, directions = np.linalg.svd(shifts.control_mean - center, full_matrices=False)
    directions = directions[:MAX_COMPONENTS].T
    # a target without controls has no prediction: its draws are nan through the control mean below
    level = np.nan_to_num(targets.control_mean - center) @ directions
    blocks = [
        _standardised((shifts.control_mean - center) @ directions, level),
        _standardised(features[shifts.condition], features[targets.condition]),
    ]
    known, wanted = (np.hstack(parts) for parts in zip(*blocks, strict=True))
    penalty, variance = 1.0, np.zeros_like(center)
    batches = np.unique(shifts.batch)
    if len(batches) > 1:
        squares = []
        for candidate in PENALTIES:
            error = np.empty_like(shifts.shift)
            for batch in batches:
                out = shifts.batch == batch
                error[out] = shifts.shift[out] - _ridge(
                    known[~out], shifts.shift[~out], known[out], candidate
                )
            squares.append(np.square(error).mean(0))
        best = int(np.argmin([square.mean() for square in squares]))
        penalty = float(PENALTIES[best])
        variance = np.maximum(squares[best] - (shifts.noise + shifts.control_noise).mean(0), 0.0)
    predicted = _ridge(known, shifts.shift, wanted, penalty)
    return _around_controls(targets, predicted, np.broadcast_to(variance, predicted.shape), num_draws, rng)


def _ridge(inputs: np.ndarray, response: np.ndarray, wanted: np.ndarray, penalty: float) -> np.ndarray:
    """Predictions (T, G) from inputs (R, F), (T, F) and response (R, G), with an intercept, in the dual: R <= F often."""
    center, mean = inputs.mean(0), response.mean(0)
    x = inputs - center
    gram = x @ x.T / len(x) + penalty * np.eye(len(x))
    return mean + (wanted - center) @ x.T @ np.linalg.solve(gram, response - mean) / len(x)


def _standardised(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both about the mean of `known` and divided by its total standard deviation: a block then has variance 1."""
    finite = np.isfinite(known).all(1)
    center = known[finite].mean(0) if finite.any() else np.zeros(known.shape[1])
    scale = float(np.sqrt(known[finite].var(0).sum())) if finite.any() else 0.0
    return tuple(  # type: ignore[return-value]
        np.where(np.isfinite(values).all(1, keepdims=True), values - center, 0.0) / (scale or 1.0)
        for values in (known, wanted)
    )


def _one_hot(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Indicators of the levels of `known`, less their mean; a code that is not among them has zeros: the mean effect."""
    levels = np.unique(known)
    share = (known[:, None] == levels).mean(0)
    return np.where(np.isin(codes, levels)[:, None], (codes[:, None] == levels) - share, 0.0)


def _known_shifts(table: TrainingTable) -> Shifts:
    shifts = paired_shifts(table)
    if not len(shifts.shift):
        raise ValueError(
            "no perturbed training population has controls in its own batch; nothing can be regressed"
        )
    return shifts


def _around_controls(
    targets: Targets, shift: np.ndarray, variance: np.ndarray, num_draws: int, rng: np.random.Generator
) -> np.ndarray:
    spread = np.sqrt(variance + targets.control_noise)
    return targets.control_mean + shift + spread * rng.standard_normal((num_draws, *shift.shape))

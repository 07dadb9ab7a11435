"""Simple predictors of a held-out population mean, which every model has to beat: pure arrays, no labels.

All of them return draws (S, T, G) of the absolute *latent* mean of T target populations, on the scale of the data.
`noise` is always the variance C / n of an observed mean. Replicates of a target are the training populations with
its context and condition (perturbation at a dose), one per batch; where a pair was never seen they are those of its
condition in the other contexts, and for an unseen condition all perturbed populations of its context, then all.

The variance *between* batches is estimated without sampling noise, `max(0, variance of the replicates - their mean
noise)`, and a new batch around the mean of D replicates has `(1 + 1/D)` times it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

CONTROL = -1  # the condition code of controls


@dataclass(frozen=True, eq=False)
class TrainingTable:
    """P training populations: means (P, G), noise C / n (P, G) and integer codes (P,) of what they are.

    `condition` is `CONTROL` for controls and a code of (perturbation, dose) otherwise.
    """

    mean: np.ndarray
    noise: np.ndarray
    context: np.ndarray
    condition: np.ndarray
    batch: np.ndarray


@dataclass(frozen=True, eq=False)
class Targets:
    """T populations to predict: codes (T,), and mean and noise (T, G) of the controls of their (context, batch).

    Where a (context, batch) has no controls these are nan, and so are the draws of predictors that need them.
    """

    context: np.ndarray
    condition: np.ndarray
    control_mean: np.ndarray
    control_noise: np.ndarray


@dataclass(frozen=True, eq=False)
class Shifts:
    """Shifts (R, G) of R training populations from the controls of their own batch, with the noises of both sides."""

    shift: np.ndarray
    noise: np.ndarray
    control_mean: np.ndarray
    control_noise: np.ndarray
    context: np.ndarray
    condition: np.ndarray
    batch: np.ndarray


def paired_shifts(table: TrainingTable) -> Shifts:
    """Every perturbed population that has controls in its own (context, batch), minus those controls."""
    controls = {(table.context[j], table.batch[j]): j for j in np.flatnonzero(table.condition == CONTROL)}
    pairs = [
        (j, controls[key])
        for j in np.flatnonzero(table.condition != CONTROL)
        if (key := (table.context[j], table.batch[j])) in controls
    ]
    treated, control = np.array(pairs, dtype=int).reshape(-1, 2).T
    return Shifts(
        shift=table.mean[treated] - table.mean[control],
        noise=table.noise[treated],
        control_mean=table.mean[control],
        control_noise=table.noise[control],
        context=table.context[treated],
        condition=table.condition[treated],
        batch=table.batch[treated],
    )


def no_change(targets: Targets, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """The given controls and their sampling noise: N(control mean, C / n)."""
    return _normal(targets.control_mean, targets.control_noise, num_draws, rng)


def perturbation_mean(
    table: TrainingTable, targets: Targets, num_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """The replicates' absolute means and their noise-corrected spread, a Gaussian: the given controls are ignored."""
    treated = table.condition != CONTROL
    groups = _replicates(table.context[treated], table.condition[treated], targets)
    summary = [_mean_and_spread(table.mean[treated][rows], table.noise[treated][rows]) for rows in groups]
    mean, variance, number = (np.array(part) for part in zip(*summary, strict=True))
    return _normal(mean, variance * (1 + 1 / number[:, None]), num_draws, rng)


def training_shift(table: TrainingTable, targets: Targets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean shift (T, G) of the replicates from their own controls, its noise-corrected variance, and their number (T,).

    The noise taken off the variance is that of both sides, perturbed and control.
    """
    shifts = paired_shifts(table)
    groups = _replicates(shifts.context, shifts.condition, targets)
    summary = [
        _mean_and_spread(shifts.shift[rows], shifts.noise[rows] + shifts.control_noise[rows])
        for rows in groups
    ]
    mean, variance, number = (np.array(part) for part in zip(*summary, strict=True))
    return mean, variance, number


def mean_shift_null(
    table: TrainingTable, targets: Targets, num_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """The null: given controls + mean shift of the training batches, spread as the training batches spread.

    A Gaussian with variance `(1 + 1/D) variance between batches + noise of the given controls`, see `shift_law`.
    On `bodenmiller_bcrxl_cytof`, leaving one donor out, it gives: excess squared
    error 0.0542, CRPS 0.1323, cover 0.849 with the variance of the cells divided by n, and 0.0539, 0.1324,
    0.844 with the unbiased one (n - 1) that is used here.
    """
    mean, variance, number = training_shift(table, targets)
    return shift_law(targets.control_mean, targets.control_noise, mean, variance, number, num_draws, rng)


def student_t_null(
    table: TrainingTable, targets: Targets, num_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """As `mean_shift_null`, with the batch effect from a Student t with D - 1 degrees of freedom.

    The predictive law of a random effect whose variance was estimated from D batches; with D < 3 the Gaussian.
    """
    mean, variance, number = training_shift(table, targets)
    return shift_law(
        targets.control_mean, targets.control_noise, mean, variance, number, num_draws, rng, student_t=True
    )


def shift_law(
    control_mean: np.ndarray,
    control_noise: np.ndarray,
    shift: np.ndarray,
    shift_variance: np.ndarray,
    num_replicates: np.ndarray,
    num_draws: int,
    rng: np.random.Generator,
    student_t: bool = False,
) -> np.ndarray:
    """Draws (S, T, G) of control + shift + new batch's deviation + noise of the given controls.

    Control mean and noise, shift and its variance between batches (T, G); number D of batches the last two come
    from (T,). The deviation has scale sqrt(shift_variance (1 + 1/D)): one new batch around a mean of D.
    """
    number = num_replicates[:, None]
    scale = np.sqrt(shift_variance * (1 + 1 / number))
    deviation = rng.standard_normal((num_draws, *shift.shape))
    if student_t:
        degrees = np.where(number > 2, number - 1.0, np.inf)  # one degree of freedom has no mean and no CRPS
        finite = np.isfinite(degrees)
        chi_square = 2 * rng.standard_gamma(np.where(finite, degrees, 1.0) / 2, deviation.shape)
        deviation *= np.where(finite, np.sqrt(np.where(finite, degrees, 1.0) / chi_square), 1.0)
    return _normal(control_mean, control_noise, num_draws, rng) + shift + scale * deviation


@dataclass(frozen=True, eq=False)
class Slopes:
    """Own-baseline slopes of one condition: estimate (G,) and posterior variance (G,)."""

    slope: np.ndarray
    variance: np.ndarray


def own_baseline_slope(
    table: TrainingTable, targets: Targets, num_draws: int, rng: np.random.Generator
) -> np.ndarray:
    """A shift that depends on the batch's own control level: r = a(context, condition) + B (control - its mean).

    The mean is that of the context: where a pair was never seen, its controls in training; without these, its own.
    One slope B per gene and condition, pooled over contexts (`fit_slopes`); the rest is a Gaussian around it whose
    variance is plugged in: `(1 + 1/D) residual variance between batches (noise-corrected, D - 2 degrees of freedom)
    + (1 + B)^2 noise of the given controls + (control - its mean)^2 variance of B`.
    """
    shifts = paired_shifts(table)
    groups = _replicates(shifts.context, shifts.condition, targets)
    slopes = {condition: fit_slopes(shifts, condition) for condition in np.unique(targets.condition)}
    mean, variance = np.empty_like(targets.control_mean), np.empty_like(targets.control_mean)
    for t, rows in enumerate(groups):
        b = slopes[targets.condition[t]]
        centers = _context_centers(shifts, rows)
        residual = shifts.shift[rows] - b.slope * (shifts.control_mean[rows] - centers)
        # the residual is m_pert - (1 + B) m_ctrl, up to constants: this is the noise in it
        noise = shifts.noise[rows] + (1 + b.slope) ** 2 * shifts.control_noise[rows]
        level, spread, number = _mean_and_spread(residual, noise, fitted=2)
        deviation = targets.control_mean[t] - _own_center(table, shifts, rows, targets, t)
        mean[t] = targets.control_mean[t] + level + b.slope * deviation
        variance[t] = (
            spread * (1 + 1 / number)
            + (1 + b.slope) ** 2 * targets.control_noise[t]
            + deviation**2 * b.variance
        )
    return _normal(mean, variance, num_draws, rng)


def _context_centers(shifts: Shifts, rows: np.ndarray) -> np.ndarray:
    """For each replicate (R, G) the mean control level of the replicates of its context."""
    contexts = shifts.context[rows]
    return np.stack([shifts.control_mean[rows[contexts == c]].mean(0) for c in contexts])


def _own_center(
    table: TrainingTable, shifts: Shifts, rows: np.ndarray, targets: Targets, t: int
) -> np.ndarray:
    """The control level (G,) from which a target's own one deviates."""
    own = rows[shifts.context[rows] == targets.context[t]]
    if own.size:
        return shifts.control_mean[own].mean(0)
    controls = (table.condition == CONTROL) & (table.context == targets.context[t])
    return table.mean[controls].mean(0) if controls.any() else targets.control_mean[t]


def fit_slopes(shifts: Shifts, condition: int) -> Slopes:
    """Per-gene slope of the shift on the own control level, around (context, condition) means.

    Least squares over contexts and batches, corrected for errors in variables: the controls' noise adds
    (1 - 1/D) C/n to the square of the regressor and takes it off the product, since it enters the shift with a
    minus sign. Standard errors treat a batch as one observation (its contexts share an environment). Then shrunk
    towards the mean over genes, `B_g ~ N(mu, tau^2)` with mu and tau^2 by maximum likelihood. Zero, with no
    variance, for a condition that no context has in two batches.
    """
    num_genes = shifts.shift.shape[1]
    product, square, raw_square = np.zeros(num_genes), np.zeros(num_genes), np.zeros(num_genes)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for context in np.unique(shifts.context[shifts.condition == condition]):
        rows = np.flatnonzero((shifts.condition == condition) & (shifts.context == context))
        if len(rows) < 2:
            continue
        x = shifts.control_mean[rows] - shifts.control_mean[rows].mean(0)
        r = shifts.shift[rows] - shifts.shift[rows].mean(0)
        noise = (1 - 1 / len(rows)) * shifts.control_noise[rows]
        product += (x * r + noise).sum(0)
        raw_square += (x**2).sum(0)
        square += (x**2 - noise).sum(0)
        parts.append((shifts.batch[rows], x, r, noise))
    if not parts:
        return Slopes(np.zeros(num_genes), np.zeros(num_genes))
    # a regressor that is nearly all noise says nothing, and dividing by its remainder would say anything
    square = np.maximum(square, 0.1 * raw_square)
    usable = square > 0
    square = np.where(usable, square, 1.0)
    slope = np.where(usable, product / square, 0.0)

    batches = np.unique(np.concatenate([part[0] for part in parts]))
    score = np.zeros(
        (len(batches), num_genes)
    )  # sum of x (r - B x) of a batch; its mean over batches is about 0
    for batch, x, r, _ in parts:
        np.add.at(score, np.searchsorted(batches, batch), x * (r - slope * x))
    inflation = len(batches) / max(len(batches) - 1, 1)
    error = np.where(usable, inflation * (score**2).sum(0) / square**2, np.inf)
    return _shrink(slope, error)


def _shrink(slope: np.ndarray, error: np.ndarray) -> Slopes:
    """Normal-normal empirical Bayes: slopes (G,) with squared standard errors (G,), infinite where unknown."""
    known = np.isfinite(error)
    if not known.any():
        return Slopes(np.zeros_like(slope), np.zeros_like(slope))
    b, v = slope[known], error[known]

    def center(tau_squared: float) -> float:
        return float(np.sum(b / (tau_squared + v)) / np.sum(1 / (tau_squared + v)))

    def loss(log_tau_squared: float) -> float:
        total = np.exp(log_tau_squared) + v
        return float(np.sum(np.log(total) + (b - center(np.exp(log_tau_squared))) ** 2 / total))

    # between genes slopes differ by 0.01 to 3: outside, the data have said 'equal' or 'unrelated'
    tau_squared = float(np.exp(minimize_scalar(loss, bounds=(np.log(1e-4), np.log(9.0)), method="bounded").x))
    mu = center(tau_squared)
    weight = np.where(known, tau_squared / (tau_squared + np.where(known, error, 1.0)), 0.0)
    return Slopes(mu + weight * (slope - mu), (1 - weight) * tau_squared)


def _replicates(context: np.ndarray, condition: np.ndarray, targets: Targets) -> Sequence[np.ndarray]:
    """For each target the rows of its replicates, see the module's first lines. Raises: ValueError without rows."""
    if not len(context):
        raise ValueError(
            "no perturbed training population has controls in its own batch; nothing can be averaged"
        )
    found = []
    for c, tau in zip(targets.context, targets.condition, strict=True):
        choices = (
            (context == c) & (condition == tau),
            condition == tau,
            context == c,
            np.ones(len(context), bool),
        )
        found.append(np.flatnonzero(next(choice for choice in choices if choice.any())))
    return found


def _mean_and_spread(
    values: np.ndarray, noise: np.ndarray, fitted: int = 1
) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean (G,) of replicates (D, G), their variance (G,) less the mean noise, and D.

    `fitted` numbers were estimated from the replicates. The variance is 0 where D does not exceed them: one batch
    cannot say how batches differ.
    """
    number = len(values)
    mean = values.mean(0)
    if number <= fitted:
        return mean, np.zeros_like(mean), number
    variance = np.square(values - mean).sum(0) / (number - 1) - noise.mean(0)
    return mean, np.maximum(variance, 0.0) * (number - 1) / (number - fitted), number


def _normal(mean: np.ndarray, variance: np.ndarray, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    return mean + np.sqrt(variance) * rng.standard_normal((num_draws, *mean.shape))

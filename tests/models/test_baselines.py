import numpy as np
import pytest

from hilbertcell.models.baselines import (
    CONTROL,
    Targets,
    TrainingTable,
    fit_slopes,
    mean_shift_null,
    no_change,
    own_baseline_slope,
    paired_shifts,
    perturbation_mean,
    shift_law,
    student_t_null,
    training_shift,
)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def simulate(rng, num_batches=6, num_contexts=3, num_genes=40, slope=0.0, noise=0.05, spread=0.3):
    """One condition in every (context, batch): true means, and the table with sampling noise of variance `noise`."""
    slope = np.broadcast_to(slope, num_genes)
    alpha = 10 + rng.normal(size=(num_contexts, num_genes))
    effect = 2 + rng.normal(size=(num_contexts, num_genes))
    context, batch = (
        np.repeat(np.arange(num_contexts), num_batches),
        np.tile(np.arange(num_batches), num_contexts),
    )
    deviation = rng.normal(size=(len(context), num_genes))
    control = alpha[context] + deviation
    treated = control + effect[context] + slope * deviation + spread * rng.normal(size=deviation.shape)
    latent = np.concatenate([control, treated])
    table = TrainingTable(
        mean=latent + np.sqrt(noise) * rng.normal(size=latent.shape),
        noise=np.full_like(latent, noise),
        context=np.tile(context, 2),
        condition=np.repeat([CONTROL, 0], len(context)),
        batch=np.tile(batch, 2),
    )
    return table, latent


def hold_out(table, latent, batch):
    """Training table without one batch, its targets, and the true means of these."""
    keep = table.batch != batch
    control = (table.batch == batch) & (table.condition == CONTROL)
    treated = (table.batch == batch) & (table.condition != CONTROL)
    training = TrainingTable(
        *(getattr(table, name)[keep] for name in ("mean", "noise", "context", "condition", "batch"))
    )
    targets = Targets(
        table.context[treated], table.condition[treated], table.mean[control], table.noise[control]
    )
    return training, targets, latent[treated]


def cover_of(draws, truth, level=0.9):
    lower, upper = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (lower <= truth) & (truth <= upper)


def test_shifts_pair_a_population_with_the_controls_of_its_own_batch_and_context():
    # Control levels tell where each came from: 100 context + 10 batch.
    context, batch = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    control = (100.0 * context + 10 * batch)[:, None]
    table = TrainingTable(
        mean=np.concatenate([control, control + 1 + context[:, None], [[7.0]]]),
        noise=np.arange(9.0)[:, None],
        context=np.append(np.tile(context, 2), 2),
        condition=np.append(np.repeat([CONTROL, 5], 4), 5),
        batch=np.append(np.tile(batch, 2), 0),
    )
    shifts = paired_shifts(table)
    assert shifts.shift[:, 0].tolist() == [1, 1, 2, 2]  # the population of context 2 has no controls
    assert shifts.noise[:, 0].tolist() == [4, 5, 6, 7]
    assert shifts.control_noise[:, 0].tolist() == [0, 1, 2, 3]
    targets = Targets(np.array([0, 1, 2]), np.array([5, 5, 5]), np.zeros((3, 1)), np.zeros((3, 1)))
    mean, _, number = training_shift(table, targets)
    assert mean[:, 0].tolist() == [1, 2, 1.5]  # an unseen pair takes the condition's mean over contexts
    assert number.tolist() == [2, 2, 4]


def test_an_unseen_condition_takes_the_shifts_of_its_context(rng):
    table, _ = simulate(rng)
    targets = Targets(np.array([1]), np.array([99]), np.zeros((1, 40)), np.zeros((1, 40)))
    shifts = paired_shifts(table)
    np.testing.assert_allclose(
        training_shift(table, targets)[0][0], shifts.shift[shifts.context == 1].mean(0)
    )


def test_without_pairs_there_is_nothing_to_average(rng):
    table, latent = simulate(rng)
    training, targets, _ = hold_out(table, latent, 0)
    lonely = TrainingTable(training.mean, training.noise, training.context, training.condition, np.arange(30))
    with pytest.raises(ValueError, match="nothing can be averaged"):
        mean_shift_null(lonely, targets, 10, rng)


def test_the_spread_between_batches_is_estimated_without_noise(rng):
    for noise in (0.0, 0.5):
        table, _ = simulate(rng, num_batches=40, num_genes=300, noise=noise, spread=0.6)
        targets = Targets(np.zeros(1, int), np.zeros(1, int), np.zeros((1, 300)), np.zeros((1, 300)))
        variance = training_shift(table, targets)[1]
        # each gene has a relative error of sqrt(2 / 39) of the whole variance 0.36 + 2 noise
        error = (0.36 + 2 * noise) * np.sqrt(2 / 39 / 300)
        assert abs(variance.mean() - 0.36) < 4 * error + 0.02 * noise  # cut at 0 in few genes


def test_null_laws_by_their_moments(rng):
    control, noise = np.array([[5.0, -5.0]]), np.array([[0.2, 0.0]])
    shift, variance, number = np.array([[1.0, 2.0]]), np.array([[0.5, 2.0]]), np.array([5])
    expected = 1.2 * variance + noise
    gaussian = shift_law(control, noise, shift, variance, number, 100_000, rng)
    for draws, total in (
        (gaussian, expected),
        (
            shift_law(control, noise, shift, variance, number, 100_000, rng, student_t=True),
            2.4 * variance + noise,
        ),
    ):  # a Student t with 4 degrees of freedom has twice the variance of its scale
        np.testing.assert_allclose(draws.mean(0), control + shift, atol=4 * np.sqrt(total.max() / 100_000))
        np.testing.assert_allclose(draws.var(0), total, rtol=0.15)
    np.testing.assert_allclose(gaussian.var(0), expected, rtol=0.03)


def test_two_batches_have_no_student_t(rng):
    draws = shift_law(*np.zeros((3, 1, 1)), np.ones((1, 1)), np.array([2]), 20_000, rng, student_t=True)
    assert np.abs(draws).max() < 8  # a Cauchy of 20,000 draws reaches thousands


@pytest.mark.parametrize(
    ("baseline", "expected"),
    # exact for a Student t; a Gaussian with the variance of 8 batches plugged in covers P(|t_7| < 1.645)
    [(student_t_null, 0.9), (mean_shift_null, 0.856), (own_baseline_slope, 0.856)],
)
def test_laws_cover_as_they_should_when_their_assumptions_hold(rng, baseline, expected):
    hits = []
    for _ in range(40):
        table, latent = simulate(rng, num_batches=9, noise=1e-4)
        training, targets, truth = hold_out(table, latent, 3)
        hits.append(cover_of(baseline(training, targets, 400, rng), truth).mean())
    error = np.std(hits) / np.sqrt(len(hits))
    assert abs(np.mean(hits) - expected) < 4 * error + 0.005  # quantiles of 400 draws


def test_the_null_ignores_own_baselines_and_the_slope_finds_them(rng):
    errors = {mean_shift_null: [], own_baseline_slope: [], perturbation_mean: []}
    for batch in range(6):
        table, latent = simulate(rng, slope=-0.7)
        training, targets, truth = hold_out(table, latent, batch)
        for baseline, found in errors.items():
            found.append(((baseline(training, targets, 400, rng).mean(0) - truth) ** 2).mean())
    mean = {baseline: np.mean(found) for baseline, found in errors.items()}
    assert mean[own_baseline_slope] < 0.6 * mean[mean_shift_null]
    assert mean[own_baseline_slope] < 0.9 * mean[perturbation_mean]


def test_slopes_are_corrected_for_errors_in_variables(rng):
    # Noise of half the spread of the controls biases a plain regression from -0.3 towards -0.54.
    table, _ = simulate(rng, num_batches=30, num_genes=200, slope=-0.3, noise=0.5)
    shifts = paired_shifts(table)
    plain = np.empty_like(shifts.shift)
    for context in range(3):
        rows = shifts.context == context
        plain[rows] = shifts.control_mean[rows] - shifts.control_mean[rows].mean(0)
    naive = (plain * shifts.shift).sum(0) / (plain**2).sum(0)
    slopes = fit_slopes(shifts, 0)
    assert naive.mean() < -0.48
    assert abs(slopes.slope.mean() + 0.3) < 0.05
    # equal over genes: shrunk together, and said to be sure of it
    assert slopes.slope.std() < 0.5 * naive.std()
    assert slopes.variance.max() < 0.02


def test_slopes_that_differ_between_genes_are_kept_apart(rng):
    true = np.where(np.arange(200) < 100, -0.9, 0.1)
    table, _ = simulate(rng, num_batches=12, num_genes=200, slope=true)
    slopes = fit_slopes(paired_shifts(table), 0)
    assert abs(slopes.slope[:100].mean() + 0.9) < 0.1
    assert abs(slopes.slope[100:].mean() - 0.1) < 0.1
    standardised = (slopes.slope - true) / np.sqrt(slopes.variance)
    assert 0.6 < standardised.std() < 1.6


@pytest.mark.parametrize(
    ("world", "least", "most"),
    [
        # the controls' noise, of the target and in training; cut at 0 the variance between batches is a little large
        ({"num_batches": 20, "noise": 0.4, "spread": 0.2}, 0.85, 1.0),
        # slopes from four batches: their standard errors are plug-ins, too small by a third
        ({"num_batches": 5, "noise": 0.01, "spread": 0.4, "num_contexts": 1}, 1.0, 1.5),
    ],
)
def test_the_slope_law_knows_most_of_its_errors(rng, world, least, most):
    squares, variances = [], []
    for _ in range(100):
        slope = -0.3 + 0.6 * rng.normal(size=40)
        table, latent = simulate(rng, slope=slope, **world)
        training, targets, truth = hold_out(table, latent, 0)
        draws = own_baseline_slope(training, targets, 200, rng)
        squares.append(((draws.mean(0) - truth) ** 2).mean())
        variances.append(draws.var(0).mean())
    assert least < np.sum(squares) / np.sum(variances) < most


def test_a_condition_of_one_batch_has_no_slope(rng):
    table, latent = simulate(rng, num_batches=2)
    training, targets, _ = hold_out(table, latent, 0)
    slopes = fit_slopes(paired_shifts(training), 0)
    assert not slopes.slope.any()
    assert not slopes.variance.any()
    draws = own_baseline_slope(training, targets, 200, rng)
    shift = training_shift(training, targets)[0]
    np.testing.assert_allclose(draws.mean(0), targets.control_mean + shift, atol=5 * np.sqrt(0.05 / 200))


def test_no_change_is_the_controls_with_their_noise(rng):
    table, latent = simulate(rng)
    _, targets, _ = hold_out(table, latent, 0)
    draws = no_change(targets, 4000, rng)
    np.testing.assert_allclose(draws.mean(0), targets.control_mean, atol=5 * np.sqrt(0.05 / 4000))
    np.testing.assert_allclose(draws.var(0), targets.control_noise, rtol=0.2)


def test_missing_controls_give_missing_draws_where_they_are_needed(rng):
    table, latent = simulate(rng)
    training, targets, _ = hold_out(table, latent, 0)
    blind = Targets(targets.context, targets.condition, targets.control_mean.copy(), targets.control_noise)
    blind.control_mean[1] = np.nan
    for baseline in (mean_shift_null, own_baseline_slope):
        draws = baseline(training, blind, 10, rng)
        assert np.isnan(draws[:, 1]).all()
        assert np.isfinite(draws[:, [0, 2]]).all()
    assert np.isfinite(perturbation_mean(training, blind, 10, rng)).all()

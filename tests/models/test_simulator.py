"""The simulated world does what its settings say."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy import stats

from hilbertcell.models.simulator import (
    SimulatorSettings,
    cells,
    draw_environments,
    draw_population_means,
    draw_world,
    generator,
    populations,
)

KEY = jax.random.key(3)
SMALL = SimulatorSettings(num_genes=30, contexts=("x", "y"), mixed_responders=False)
MANY = 1500  # batches where a law over batches is tested


@pytest.fixture(scope="module")
def small_world():
    return draw_world(KEY, SMALL)


@pytest.fixture(scope="module")
def many_environments():
    return draw_environments(KEY, SMALL, MANY)


def rates_of(settings, world, environments, perturbation, dose=None):
    """Rates of one perturbation in context 1 of every batch."""
    number = len(environments.depth)
    codes = np.full(number, 1), np.full(number, settings.labels.index(perturbation)), np.arange(number)
    return populations(settings, world, environments, *codes, dose)


def test_counts_have_the_stated_mean_variance_and_library_sizes(small_world, many_environments):
    settings = replace(SMALL, state_scale=0.0, library_scale=0.0)
    world = small_world._replace(state=np.zeros_like(small_world.state))
    rates = rates_of(settings, world, many_environments, "A")
    n = 20_000
    counts, responds = cells(np.random.default_rng(1), settings, world, rates, 5, n)
    assert responds.all()
    logits = np.asarray(rates.control[5] + rates.shift[5], np.float64)
    library = np.exp(float(rates.log_library[5]) + float(rates.library_response[5]))
    mean = library * np.exp(logits) / np.exp(logits).sum()
    variance = mean + np.asarray(world.dispersion) * mean**2
    assert np.abs((counts.mean(0) - mean) / np.sqrt(variance / n)).max() < 4.5
    fourth = ((counts - counts.mean(0)) ** 4).mean(0)  # the standard error of a variance
    error = np.sqrt((fourth - variance**2) / n)
    seen = mean > 0.5  # rarer genes have too few events for a normal error
    assert seen.sum() > 10
    assert np.abs((counts.var(0) - variance) / error)[seen].max() < 5


def test_cell_states_and_library_sizes_spread_cells(small_world, many_environments):
    rates = rates_of(SMALL, small_world, many_environments, "control")
    counts, responds = cells(np.random.default_rng(2), SMALL, small_world, rates, 0, 20_000)
    assert not responds.any()
    library = np.log(counts.sum(1))
    assert library.std() > SMALL.library_scale  # plus the spread of overdispersed counts
    per_cell = counts / counts.sum(1, keepdims=True)
    without = small_world._replace(state=np.zeros_like(small_world.state))
    flat, _ = cells(np.random.default_rng(2), SMALL, without, rates, 0, 20_000)
    flat = flat / flat.sum(1, keepdims=True)
    state = np.asarray(small_world.state)
    top = np.argsort(np.asarray(rates.control[0]))[-10:]
    expected = (state.T @ state)[np.ix_(top, top)]
    gained = np.corrcoef(per_cell[:, top].T) - np.corrcoef(flat[:, top].T)
    upper = np.triu_indices(10, 1)
    assert np.corrcoef(expected[upper], gained[upper])[0, 1] > 0.5


def test_environments_have_the_stated_scales(many_environments):
    u, d, eps, eps_response, depth = many_environments
    for values, scale in (
        (u, 1.0),
        (d, SMALL.batch_effect_scale),
        (eps, SMALL.control_residual_scale),
        (eps_response, SMALL.response_residual_scale),
        (depth, SMALL.depth_scale),
    ):
        ratio = np.asarray(values, np.float64).std() / scale
        assert abs(ratio - 1) < 4 / np.sqrt(2 * values.size)
    assert np.abs(np.corrcoef(u.T)[0, 1]) < 4 / np.sqrt(MANY)


def test_control_shift_and_effects_follow_the_equations(small_world, many_environments):
    w, e = small_world, many_environments
    rates = rates_of(SMALL, w, e, "B")
    t = SMALL.labels.index("B")
    u = np.asarray(e.microenvironment)
    deviation = u @ np.asarray(w.loading[1]) + np.asarray(e.control_residual[:, 1])
    np.testing.assert_allclose(rates.control, np.asarray(w.baseline[1]) + deviation, atol=1e-5)
    shift = np.asarray(w.effect[t] + w.interaction[1, t]) + np.asarray(w.slope[t]) * deviation
    shift = (
        shift + u @ np.asarray(w.modulation[t]) + np.asarray(e.batch_effect + e.response_residual[:, 1, t])
    )
    np.testing.assert_allclose(rates.shift, shift, atol=1e-5)
    assert np.asarray(w.slope[t]).mean() < 0  # saturation


def test_the_inert_perturbation_does_nothing_at_all(small_world, many_environments):
    rates = rates_of(SMALL, small_world, many_environments, "inert")
    assert not np.asarray(rates.shift).any()
    assert not np.asarray(rates.library_response).any()
    assert not np.asarray(rates.fraction).any()
    assert np.abs(rates_of(SMALL, small_world, many_environments, "A").shift).mean() > 0.1
    draw = [
        draw_population_means(KEY, SMALL, small_world, "x", name, 4, num_cells=20)
        for name in ("control", "inert")
    ]
    np.testing.assert_array_equal(*draw)


def test_a_combination_is_its_members_plus_the_synergy(small_world, many_environments):
    w = small_world
    a, b, both = (SMALL.labels.index(name) for name in ("A", "B", "A+B"))
    np.testing.assert_allclose(w.effect[both], w.effect[a] + w.effect[b] + w.synergy[both], atol=1e-6)
    touched = np.abs(w.effect[a]) + np.abs(w.effect[b]) > 0
    assert np.abs(w.synergy[both])[touched].min() > 0
    assert not np.asarray(w.synergy[both])[~touched].any()
    assert not np.asarray(w.synergy)[[a, b]].any()
    np.testing.assert_allclose(w.modulation[both], w.modulation[a] + w.modulation[b], atol=1e-6)


def test_features_explain_effects_as_far_as_their_share_says(small_world):
    explained = draw_world(KEY, replace(SMALL, num_features=1, feature_share=1.0))
    pair = slice(1, 3)  # A and B: with one feature that explains everything, multiples of one programme
    assert np.linalg.matrix_rank(np.asarray(explained.effect[pair]), tol=1e-4) == 1
    assert np.linalg.matrix_rank(np.asarray(small_world.effect[pair]), tol=1e-4) == 2


def test_the_gaussian_law_is_gaussian_and_the_bimodal_one_is_not(small_world, many_environments):
    assert SMALL.gaussian_law
    assert not SimulatorSettings().gaussian_law
    assert not replace(SMALL, bimodal_environment=True).gaussian_law
    rates = rates_of(SMALL, small_world, many_environments, "A")
    assert (np.asarray(rates.fraction) == 1).all()
    latent = np.asarray(rates.control + rates.shift, np.float64)
    assert np.abs(stats.skew(latent)).max() < 4.5 * np.sqrt(6 / MANY)
    assert np.abs(stats.kurtosis(latent)).max() < 4.5 * np.sqrt(24 / MANY)

    bimodal = replace(SMALL, bimodal_environment=True)
    environments = draw_environments(KEY, bimodal, MANY)
    u = np.asarray(environments.microenvironment, np.float64)
    assert np.abs(u.mean(0)).max() < 4.5 / np.sqrt(MANY)
    np.testing.assert_allclose(u.var(0), 1.0, atol=4.5 * np.sqrt(2 / MANY))
    assert (np.abs(u[:, 0]) < 0.3).mean() < 0.05
    assert (np.abs(u[:, 1]) < 0.3).mean() > 0.15
    latent = np.asarray(rates_of(bimodal, small_world, environments, "A").control, np.float64)
    loaded = np.abs(small_world.loading[1, 0]).argmax()
    assert stats.kurtosis(latent[:, loaded]) < -4.5 * np.sqrt(24 / MANY)


def test_mixed_responders_depend_on_the_microenvironment(small_world, many_environments):
    mixed = replace(SMALL, mixed_responders=True)
    rates = rates_of(mixed, small_world, many_environments, "A")
    fraction = np.asarray(rates.fraction, np.float64)
    direction = np.asarray(many_environments.microenvironment @ small_world.responder_loading)
    assert stats.spearmanr(fraction, direction).statistic > 0.999
    assert 0 < fraction.min() < fraction.max() < 1
    which = int(np.abs(fraction - 0.7).argmin())
    _, responds = cells(np.random.default_rng(0), mixed, small_world, rates, which, 5000)
    assert abs(responds.mean() - fraction[which]) < 4.5 * np.sqrt(0.25 / 5000)


def test_blind_controls_carry_no_trace_of_the_microenvironment(small_world, many_environments):
    blind = draw_world(KEY, replace(SMALL, controls_blind=True))
    zero = many_environments._replace(microenvironment=np.zeros((MANY, SMALL.num_factors), np.float32))
    one, other = (rates_of(SMALL, blind, e, "A") for e in (many_environments, zero))
    np.testing.assert_array_equal(one.control, other.control)
    assert np.abs(one.shift - other.shift).mean() > 0.05
    seeing = [rates_of(SMALL, small_world, e, "control").control for e in (many_environments, zero)]
    assert np.abs(seeing[0] - seeing[1]).mean() > 0.05
    np.testing.assert_array_equal(blind.effect, small_world.effect)  # the switch changes nothing else


def test_half_the_dose_of_half_effect_is_half_the_shift(small_world, many_environments):
    t = SMALL.labels.index("A")
    half = np.full(MANY, float(small_world.half_dose[t]), np.float32)
    full = rates_of(SMALL, small_world, many_environments, "A").shift
    np.testing.assert_allclose(
        rates_of(SMALL, small_world, many_environments, "A", half).shift, full / 2, atol=1e-6
    )
    assert not np.asarray(rates_of(SMALL, small_world, many_environments, "A", 0 * half).shift).any()


def test_draws_of_population_means_follow_the_key_and_the_microenvironment(small_world):
    def draw(key=KEY, u=None):
        return draw_population_means(key, SMALL, small_world, "y", "A", 60, u=u, num_cells=200)

    free = draw()
    np.testing.assert_array_equal(free, draw())
    assert (free != draw(jax.random.key(4))).any()
    held = draw(u=np.array([1.5, 0.0]))
    assert held.var(0).sum() < 0.7 * free.var(0).sum()
    assert np.abs(held.mean(0) - draw(u=np.array([-1.5, 0.0])).mean(0)).mean() > 0.1


def test_generator_differs_by_key_only():
    one, same, other = (generator(jax.random.key(seed)).random() for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("wrong", [{"inert": ("C",)}, {"combinations": (("A", "C"),)}])
def test_settings_refuse_names_that_stand_for_nothing(wrong):
    with pytest.raises(ValueError, match="name C, but perturbations are A, B, inert"):
        SimulatorSettings(**wrong)

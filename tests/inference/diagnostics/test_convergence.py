import numpy as np
import pytest

from hilbertcell.inference.diagnostics import convergence
from hilbertcell.inference.diagnostics.result import monte_carlo_p, verdict_of


def test_a_p_value_that_is_no_number_is_an_alarm():
    assert [verdict_of(p) for p in (0.051, 0.05, 0.011, 0.01, float("nan"))] == [
        "ok",
        "watch",
        "watch",
        "alarm",
        "alarm",
    ]


def test_monte_carlo_p_counts_the_observed_value_among_the_draws():
    null = np.arange(99.0)
    assert monte_carlo_p(98.5, null) == 0.01
    assert monte_carlo_p(-1.0, null, "less") == 0.01
    assert monte_carlo_p(98.5, null, "two-sided") == 0.02
    assert monte_carlo_p(49.0, null, "two-sided") == 1.0


def test_a_bound_that_still_rises_is_noticed_and_a_level_one_is_not():
    rng = np.random.default_rng(0)
    noise = rng.standard_t(3, 1000)
    assert convergence.bound_drift(noise, 100).verdict == "ok"
    rising = noise - np.linspace(0, 200, 1000)  # 20 nats a tenth, 0.2 an unknown
    result = convergence.bound_drift(rising, 100)
    assert result.verdict == "alarm"
    assert result.statistic == pytest.approx(0.2, abs=0.06)  # means of 100 draws of t(3) over 100 unknowns


def test_a_course_too_short_to_judge_says_so():
    assert convergence.bound_drift(np.zeros(20), 3).verdict == "watch"


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "ok"), (0.15, "ok"), (1.0, "alarm")])
def test_the_distance_of_a_guide_is_that_of_a_gaussian(shift, verdict):
    score = -shift - np.random.default_rng(1).standard_normal((100, 400))
    result = convergence.guide_location(score)
    assert result.verdict == verdict
    assert result.statistic == pytest.approx(shift, abs=0.05)


def test_the_jackknife_error_is_that_of_leaving_draws_out():
    """The p-value rests on it: compared with the definition, draw by draw."""
    score = np.random.default_rng(2).standard_normal((12, 5)) - 0.35
    unbiased = lambda x: (x.mean(0) ** 2 - x.var(0, ddof=1) / len(x)).mean()
    left_out = np.array([unbiased(np.delete(score, i, 0)) for i in range(12)])
    error = np.sqrt(11 * left_out.var())
    from scipy.stats import norm

    expected = norm.sf((unbiased(score) - convergence.DISTANCE**2) / error)
    assert convergence.guide_location(score).p == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("sd", "verdict"), [(0.5, "alarm"), (1.0, "ok"), (1.15, "ok"), (2.0, "alarm")])
def test_the_width_of_a_guide_is_that_of_a_gaussian(sd, verdict):
    noise = np.random.default_rng(3).standard_normal((100, 400))
    result = convergence.guide_width(sd**2 * (noise**2).mean(1))
    assert result.verdict == verdict
    assert result.statistic == pytest.approx(sd, rel=0.02)


def test_a_guide_so_wide_that_densities_overflow_is_noticed():
    assert convergence.guide_width(np.array([2.0, np.inf, np.nan, 1e30] * 10)).verdict == "alarm"


def test_importance_weights_of_a_near_guide_are_good_and_of_a_narrow_one_bad():
    noise = np.random.default_rng(4).standard_normal((2000, 3))
    exact = np.zeros(2000)
    narrow = (-0.5 * (0.3 * noise) ** 2 + 0.5 * noise**2).sum(
        1
    )  # guide of 0.3 sds of the posterior: k = 0.91
    assert convergence.importance_tail(exact, 3).verdict == "ok"
    assert convergence.importance_tail(0.01 * noise[:, 0], 3).statistic < convergence.GOOD_K
    assert convergence.importance_tail(narrow, 3).verdict == "watch"
    assert convergence.importance_tail(np.append(exact, -np.inf), 3).statistic == np.inf


@pytest.mark.parametrize(
    ("rhat", "ess", "diverging", "verdict"),
    [
        (1.01, 900.0, 0.0, "ok"),
        (1.2, 900.0, 0.0, "alarm"),
        (1.01, 900.0, 0.1, "alarm"),
        (1.01, 50.0, 0.0, "watch"),
    ],
)
def test_chains(rhat, ess, diverging, verdict):
    result = convergence.chains(
        np.array([1.0, rhat]), np.array([1000.0, ess]), np.array([[diverging]]), ("a", "b")
    )
    assert result.verdict == verdict

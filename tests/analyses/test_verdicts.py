import numpy as np
import pytest
from scipy.stats import ttest_rel

from hilbertcell.analyses.verdicts import bootstrap_ratio_upper, jackknife_ratio, verdicts


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def test_the_p_value_is_that_of_a_paired_t_test(rng):
    model, baseline = rng.normal(size=7), 0.5 + rng.normal(size=7)
    found = verdicts(model, {"null": baseline})["null"]
    assert found.p_loses == pytest.approx(ttest_rel(model, baseline, alternative="greater").pvalue)
    assert found.p_wins == pytest.approx(ttest_rel(model, baseline, alternative="less").pvalue)
    assert found.difference == pytest.approx((model - baseline).mean())


def test_outcomes(rng):
    base, noise = rng.normal(size=6), 0.1 * rng.normal(size=6)
    assert verdicts(base + 1 + noise, {"null": base})["null"].outcome == "loses"
    assert verdicts(base - 1 + noise, {"null": base})["null"].outcome == "wins"
    assert verdicts(base + noise - noise.mean(), {"null": base})["null"].outcome == "undecided"
    assert verdicts(base, {"null": base})["null"].outcome == "undecided"
    assert verdicts(base + 1, {"null": base})["null"].outcome == "loses"  # no variance at all


def test_three_batches_decide_nothing():
    model = np.array([5.0, 5.1, 4.9])
    assert verdicts(model, {"null": np.zeros(3)})["null"].outcome == "undecided"
    assert verdicts(np.append(model, 5.0), {"null": np.zeros(4)})["null"].outcome == "loses"


def test_holm_over_baselines(rng):
    # Differences whose one-sided p-values are known: 0.01, 0.02, 0.04 become 0.03, 0.04, 0.04.
    def baseline(p_value, num_batches=9):
        from scipy.stats import t

        pattern = np.linspace(-1, 1, num_batches)
        error = pattern.std(ddof=1) / np.sqrt(num_batches)
        return -(pattern + t.isf(p_value, num_batches - 1) * error)

    found = verdicts(np.zeros(9), {"c": baseline(0.04), "a": baseline(0.01), "b": baseline(0.02)})
    assert [found[name].p_loses for name in "abc"] == pytest.approx([0.03, 0.04, 0.04])
    assert found["c"].outcome == "loses"
    twice = verdicts(np.zeros(9), {"b": baseline(0.03), "c": baseline(0.04)})
    assert twice["c"].outcome == "undecided"  # 0.06, although 0.04 alone would do


def test_false_alarms_are_as_rare_as_promised(rng):
    found = [verdicts(rng.normal(size=6), {"null": rng.normal(size=6)})["null"].outcome for _ in range(2000)]
    rate = np.mean([outcome == "loses" for outcome in found])
    assert abs(rate - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 2000)


def test_jackknife_of_a_ratio(rng):
    # With a constant denominator the ratio is a mean, of which the jackknife error is the usual one.
    values = rng.normal(size=8) + 3
    ratio, error = jackknife_ratio(values, np.full(8, 2.0))
    assert ratio == pytest.approx(values.mean() / 2)
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(8) / 2)
    assert jackknife_ratio(2 * values, values) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-12))
    assert np.isnan(jackknife_ratio(values[:1], values[:1])[1])


def test_bootstrap_bound_is_paired_and_one_sided(rng):
    shared = rng.lognormal(sigma=1.0, size=200)
    model = 0.9 * shared * np.exp(0.05 * rng.normal(size=200))
    upper = bootstrap_ratio_upper(model, shared, rng)
    ratio, error = jackknife_ratio(model, shared)
    assert upper == pytest.approx(ratio + 1.2816 * error, abs=0.3 * error)
    assert upper < 1  # batches differ by factors of e, their ratios by 5 %: only pairing can tell
    assert bootstrap_ratio_upper(model, shared, rng, level=0.5) < upper


def test_missing_scores_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\) for null"):
        verdicts(np.zeros(2), {"null": np.zeros(3)})
    with pytest.raises(ValueError, match="missing"):
        verdicts(np.array([0.0, np.nan]), {"null": np.zeros(2)})

import numpy as np
import pytest

from hilbertcell.models.baselines import CONTROL, Targets, TrainingTable, own_baseline_slope
from hilbertcell.models.linear_baselines import additive, ridge

GENES = 30


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def world(rng, num_batches=5, spread=0.2, noise=0.01, hidden=(0, 0), effect=None):
    """3 contexts x 4 conditions x batches with additive shifts; the pair `hidden` is left out and returned apart."""
    context_effect = rng.normal(size=(3, GENES))
    condition_effect = rng.normal(size=(4, GENES)) if effect is None else effect
    level = 20 + 5 * rng.normal(size=(3, GENES))
    rows, mean = [], []
    hidden_mean, hidden_control = [], []
    for c in range(3):
        for b in range(num_batches):
            control = level[c] + rng.normal(size=GENES)
            rows.append((c, CONTROL, b))
            mean.append(control)
            for t in range(4):
                shift = context_effect[c] + condition_effect[t] + spread * rng.normal(size=GENES)
                if (c, t) == hidden:
                    hidden_mean.append(control + shift)
                    hidden_control.append(control)
                else:
                    rows.append((c, t, b))
                    mean.append(control + shift)
    context, condition, batch = np.array(rows).T
    latent = np.array(mean)
    seen = latent + np.sqrt(noise) * rng.normal(size=latent.shape)
    table = TrainingTable(seen, np.full_like(seen, noise), context, condition, batch)
    number = len(hidden_mean)
    control = np.array(hidden_control) + np.sqrt(noise) * rng.normal(size=(number, GENES))
    targets = Targets(
        np.full(number, hidden[0]), np.full(number, hidden[1]), control, np.full_like(control, noise)
    )
    return table, targets, np.array(hidden_mean)


def cover(draws, truth):
    lower, upper = np.quantile(draws, [0.05, 0.95], axis=0)
    return np.mean((lower <= truth) & (truth <= upper))


def test_an_additive_world_is_predicted_in_a_pair_that_was_never_seen(rng):
    covers, errors = [], []
    for _ in range(8):
        table, targets, truth = world(rng)
        draws = additive(table, targets, 400, rng)
        covers.append(cover(draws, truth))
        errors.append(np.mean((draws.mean(0) - truth) ** 2))
    # spread 0.2 and noise of the controls 0.1, and little more: the effects are known from many populations
    assert np.mean(errors) < 1.3 * (0.2**2 + 0.01)
    assert abs(np.mean(covers) - 0.9) < 0.03


def test_additive_gives_the_mean_effect_to_what_it_does_not_know(rng):
    table, targets, _ = world(rng, spread=0.0, noise=1e-8)
    unknown = Targets(
        np.full_like(targets.context, 1), np.full_like(targets.condition, 9), targets.control_mean,
        targets.control_noise,
    )  # fmt: skip
    shift = additive(table, unknown, 50, rng).mean(0) - targets.control_mean
    known = []
    for t in range(4):
        one = Targets(
            unknown.context, np.full_like(targets.condition, t), unknown.control_mean, unknown.control_noise
        )
        known.append(additive(table, one, 50, rng).mean(0) - targets.control_mean)
    share = np.array([np.sum(table.condition == t) for t in range(4)]) / np.sum(table.condition != CONTROL)
    np.testing.assert_allclose(shift, np.tensordot(share, known, 1), atol=1e-3)


def test_ridge_reads_effects_of_a_new_condition_off_its_features(rng):
    features = rng.normal(size=(4, 2))
    effect = features @ (3 * rng.normal(size=(2, GENES)))
    gains = []
    for hidden in range(4):
        table, targets, truth = world(rng, effect=effect, spread=0.05)
        keep = table.condition != hidden
        one = TrainingTable(
            *(getattr(table, n)[keep] for n in ("mean", "noise", "context", "condition", "batch"))
        )
        new = Targets(
            targets.context,
            np.full_like(targets.condition, hidden),
            targets.control_mean,
            targets.control_noise,
        )
        truth = truth - effect[0] + effect[hidden]
        informed = ridge(one, new, 50, rng, features).mean(0)
        blind = ridge(one, new, 50, rng, np.zeros((4, 2))).mean(0)
        gains.append(np.mean((informed - truth) ** 2) / np.mean((blind - truth) ** 2))
    assert np.median(gains) < 0.3
    missing = features.copy()
    missing[3] = np.nan
    last = Targets(
        targets.context, np.full_like(targets.condition, 3), targets.control_mean, targets.control_noise
    )
    assert np.isfinite(ridge(one, last, 20, rng, missing)).all()


def test_ridge_knows_its_errors_and_one_batch_has_none(rng):
    covers = []
    for _ in range(8):
        table, targets, _ = world(rng, spread=0.5)
        # leave a batch out: what the variance is measured by
        train = table.batch > 0
        one = TrainingTable(
            *(getattr(table, n)[train] for n in ("mean", "noise", "context", "condition", "batch"))
        )
        out = (table.batch == 0) & (table.condition != CONTROL)
        controls = {
            c: np.flatnonzero((table.context == c) & (table.condition == CONTROL) & ~train)[0]
            for c in range(3)
        }
        place = np.array([controls[c] for c in table.context[out]])
        new = Targets(table.context[out], table.condition[out], table.mean[place], table.noise[place])
        covers.append(cover(ridge(one, new, 300, rng, np.eye(4)), table.mean[out]))
    assert abs(np.mean(covers) - 0.9) < 0.05  # the observed mean has noise 0.1 beside a spread of 0.5
    single = table.batch == 1
    one = TrainingTable(
        *(getattr(table, n)[single] for n in ("mean", "noise", "context", "condition", "batch"))
    )
    assert ridge(one, targets, 200, rng, np.eye(4)).std(0).mean() == pytest.approx(0.1, rel=0.1)


def test_missing_controls_give_missing_draws_and_no_pairs_an_error(rng):
    table, targets, _ = world(rng)
    targets.control_mean[1] = np.nan
    for draws in (additive(table, targets, 5, rng), ridge(table, targets, 5, rng, np.eye(4))):
        assert np.isnan(draws[:, 1]).all()
        assert np.isfinite(draws[:, 0]).all()
    alone = table.condition != CONTROL
    bare = TrainingTable(
        *(getattr(table, n)[alone] for n in ("mean", "noise", "context", "condition", "batch"))
    )
    for baseline, extra in ((additive, ()), (ridge, (np.eye(4),))):
        with pytest.raises(ValueError, match="nothing can be regressed"):
            baseline(bare, targets, 5, rng, *extra)


def test_the_slope_of_an_unseen_pair_is_taken_about_its_own_context(rng):
    # Contexts lie 5 apart: a slope about another context's level would move the prediction by whole units.
    errors = []
    for _ in range(4):
        table, targets, truth = world(rng, effect=np.zeros((4, GENES)))
        errors.append(np.mean((own_baseline_slope(table, targets, 50, rng).mean(0) - truth) ** 2))
    assert (
        np.mean(errors) < 4.0
    )  # the effect of the hidden context, which other contexts do not tell, is of this order

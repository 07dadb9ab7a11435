"""Planted frauds x scores: each fraud moves the score that is there to see it, and leaves alone what it must.

A screen of 10 batches x 6 perturbations is simulated with everything known. The honest model draws fresh cells from the
true populations, and its law is off by 0.15 and says so. Frauds are done to its output, so that differences are paired; the
unit of replication is the batch. `up` and `down` must move by more than four standard errors, `still` by less; a score
that is not named may do either (doubling an effect, say, also calls more genes).
"""

import numpy as np
import pandas as pd
import pytest

from hilbertcell.analyses.cell_summary import score_cells, score_groups
from hilbertcell.analyses.differential_expression import de_summary
from hilbertcell.analyses.gene_table import GeneTable
from hilbertcell.analyses.law_summary import score_targets
from hilbertcell.analyses.metrics import energy_distance, within_variance_ratio

BATCHES, DRUGS, GENES, CELLS, DRAWS = 10, 6, 40, 50, 150
OFF = 0.15  # standard deviation of the honest model's error, which it knows
NAMES = np.array([f"g{i}" for i in range(GENES)])

FRAUDS = {
    "truth with fresh cells": {
        "still": ["excess", "covered_90", "energy_distance", "within_variance_ratio", "called_ratio", "direction_match",
                  "pearson", "mae", "precision_at_N", "discrimination_l2", "crps"],
    },
    "doubled effect": {
        "up": ["excess", "crps", "mae", "energy_distance"],
        "down": ["covered_90"],
        "still": ["within_variance_ratio", "direction_match"],
    },
    "halved effect": {
        "up": ["excess", "crps", "mae", "energy_distance"],
        "down": ["covered_90", "called"],
        "still": ["within_variance_ratio"],
    },
    "shrunken within-population variance": {
        "up": ["energy_distance", "called"],
        "down": ["within_variance_ratio"],
        "still": ["excess", "crps", "covered_90", "mae", "pearson", "direction_match", "discrimination_l2"],
    },
    "narrow law": {
        "down": ["covered_90"],
        "up": ["crps"],
        "still": ["excess", "mae", "energy_distance", "within_variance_ratio", "called", "pearson"],
    },
    "random perturbation labels": {
        "up": ["excess", "crps", "mae", "energy_distance"],
        "down": ["discrimination_l2", "discrimination_l1", "discrimination_cosine", "precision_at_N", "pearson"],
        "still": ["within_variance_ratio", "called"],
    },
    "control and perturbed swapped": {
        "up": ["excess", "crps", "mae", "energy_distance"],
        "down": ["direction_match", "pearson", "lfc_spearman", "discrimination_l2"],
        "still": ["within_variance_ratio", "called"],
    },
}  # fmt: skip


class World:
    """The simulated screen, and what the honest model says about it."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        effect = np.where(rng.random((DRUGS, GENES)) < 0.25, rng.choice([-0.65, 0.65], (DRUGS, GENES)), 0.0)
        control = 3 * rng.normal(size=GENES) + rng.normal(size=(BATCHES, 1, GENES))
        self.control = np.broadcast_to(control, (BATCHES, DRUGS, GENES)).reshape(-1, GENES)
        self.effect = (effect + 0.1 * rng.normal(size=(BATCHES, DRUGS, GENES))).reshape(-1, GENES)
        self.mean = self.control + self.effect
        shape = (len(self.mean), CELLS, GENES)
        self.truth = self.mean[:, None] + rng.normal(size=shape)
        self.fresh = self.mean[:, None] + rng.normal(size=shape)
        self.again = self.mean[:, None] + rng.normal(size=shape)
        # one reference per batch, as real controls are
        self.reference = (control + rng.normal(size=(BATCHES, CELLS, GENES))).repeat(DRUGS, 0)
        self.error = OFF * rng.normal(size=self.mean.shape)
        self.spread = OFF * rng.normal(size=(DRAWS, *self.mean.shape))
        index = pd.MultiIndex.from_product([range(BATCHES), range(DRUGS)])
        self.units = pd.DataFrame(
            {"context": "B", "batch": index.get_level_values(0), "perturbation": [f"p{d}" for _, d in index]},
            index=[f"unit{i}" for i in range(len(index))],
        )
        variance = self.truth.var(1, ddof=1)
        self.table = GeneTable(self.units, np.full(len(index), CELLS), self.truth.mean(1), variance, variance)

    def commit(self, name):
        """Latent draws (S, T, G) and cells (T, n, G) of a fraud."""
        law, cells = self.mean + self.error + self.spread, self.fresh
        shift = self.effect + self.error
        order = np.arange(len(self.mean)).reshape(BATCHES, DRUGS)
        match name:
            case "truth with fresh cells":
                return law, self.again
            case "doubled effect":
                return law + shift, cells + self.effect[:, None]
            case "halved effect":
                return law - shift / 2, cells - self.effect[:, None] / 2
            case "shrunken within-population variance":
                center = cells.mean(1, keepdims=True)
                return law, center + 0.6 * (cells - center)
            case "narrow law":
                return law - 0.9 * self.spread, cells
            case "random perturbation labels":
                other = np.roll(order, 1, axis=1).ravel()  # within a batch: controls stay the right ones
                return law[:, other], cells[other]
            case "control and perturbed swapped":
                return law - 2 * shift, cells - 2 * self.effect[:, None]
        return law, cells

    def scores(self, name="honest"):
        """Every score, mean per batch."""
        law, cells = self.commit(name)
        rows = [score_cells(*one) for one in zip(cells, self.truth, self.reference, strict=True)]
        table = pd.DataFrame(rows, index=self.units.index)
        effects = [side.mean(1) - self.reference.mean(1) for side in (cells, self.truth)]
        table = score_groups(table, self.units, *effects, NAMES)
        targets = score_targets(law, self.table, np.ones(GENES)).targets
        return pd.concat([table, targets], axis=1).groupby(self.units["batch"]).mean()


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def honest(world):
    return world.scores()


def z_of(difference):
    """Mean over its standard error; 0 where nothing moved, up to rounding."""
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return 0.0 if abs(difference.mean()) < 1e-9 else difference.mean() / max(error, 1e-12)


@pytest.mark.parametrize("name", FRAUDS)
def test_a_fraud_moves_its_scores_and_no_other(world, honest, name):
    difference = world.scores(name) - honest
    z = {score: z_of(difference[score].to_numpy()) for score in difference}
    for score in FRAUDS[name].get("up", []):
        assert z[score] > 4, (score, z[score])
    for score in FRAUDS[name].get("down", []):
        assert z[score] < -4, (score, z[score])
    for score in FRAUDS[name]["still"]:
        assert abs(z[score]) < 4, (score, z[score])


def test_every_score_is_moved_by_some_fraud():
    moved = {score for row in FRAUDS.values() for way in ("up", "down") for score in row.get(way, [])}
    assert moved >= {
        "excess", "crps", "covered_90", "mae", "energy_distance", "within_variance_ratio", "called", "precision_at_N",
        "direction_match", "pearson", "lfc_spearman", "discrimination_l1", "discrimination_l2", "discrimination_cosine",
    }  # fmt: skip


def test_the_honest_model_is_calibrated(honest):
    number = BATCHES * DRUGS * GENES
    assert honest["excess"].mean() == pytest.approx(
        OFF**2, abs=4 * (OFF**2 + 1 / CELLS) * np.sqrt(2 / number)
    )
    assert honest["covered_90"].mean() == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / number) + 0.01)
    assert abs(z_of(honest["energy_distance"].to_numpy())) < 4  # fresh cells of the truth: 0 on average
    assert abs(z_of(honest["within_variance_ratio"].to_numpy() - 1)) < 4


def test_more_cells_are_refused_and_would_move_the_number_of_called_genes_only(world):
    many = np.concatenate([world.fresh, world.again], axis=1)
    with pytest.raises(ValueError, match="got 100 predicted and 50 true"):
        score_cells(many[0], world.truth[0], world.reference[0])
    once, twice = [
        pd.DataFrame(
            {
                "called": [de_summary(*one)["called"] for one in zip(cells, world.truth, world.reference, strict=True)],
                "distance": [energy_distance(p, t) for p, t in zip(cells, world.truth, strict=True)],
                "within": [within_variance_ratio(p, t) for p, t in zip(cells, world.truth, strict=True)],
            }
        ).groupby(np.repeat(np.arange(BATCHES), DRUGS)).mean()
        for cells in (world.fresh, many)
    ]  # fmt: skip
    assert z_of((twice["called"] - once["called"]).to_numpy()) > 4
    for score in ("distance", "within"):
        assert abs(z_of((twice[score] - once[score]).to_numpy())) < 4


def test_scores_are_stable_when_twice_as_many_cells_are_generated(world, honest):
    """Of twice as many cells as many are scored as were measured: every score stays within its bootstrap error."""
    rng = np.random.default_rng(3)
    twice = World()
    many = np.concatenate([world.fresh, world.again], axis=1)
    twice.fresh = np.stack([cells[rng.choice(2 * CELLS, CELLS, replace=False)] for cells in many])
    difference = (twice.scores() - honest).to_numpy()
    chosen = rng.integers(BATCHES, size=(1000, BATCHES))
    error = difference[chosen].mean(1).std(0)
    z = np.abs(difference.mean(0)) / np.maximum(error, 1e-9)
    z[np.abs(difference.mean(0)) < 1e-9] = 0.0
    assert z.max() < 4.5, dict(zip(honest, z.round(1), strict=True))


def test_means_of_few_cells_differ_by_noise_that_only_equal_numbers_share(world):
    """Why so: the error of a mean falls with the number of generated cells, by as much as their noise is worth."""
    many = np.concatenate([world.fresh, world.again], axis=1)
    error = [np.abs(cells.mean(1) - world.truth.mean(1)).mean() for cells in (world.fresh, many)]
    # sqrt(1/n + 1/2n) of sqrt(1/n + 1/n)
    assert error[1] / error[0] == pytest.approx(np.sqrt(0.75), abs=0.04)


def test_a_leaked_truth_shows_in_an_error_below_zero(world):
    # Who repeats the observed mean is nearer to it than the latent mean itself: its noise is taken off in vain.
    leaked = np.broadcast_to(world.table.mean, (2, *world.mean.shape))
    known = np.broadcast_to(world.mean, (2, *world.mean.shape))
    unit, batch = np.ones(GENES), world.units["batch"]
    excess = {
        name: score_targets(law, world.table, unit).targets["excess"].groupby(batch).mean().to_numpy()
        for name, law in {"leaked": leaked, "known": known}.items()
    }
    assert z_of(excess["leaked"]) < -4
    assert abs(z_of(excess["known"])) < 4


def test_scores_do_not_depend_on_the_order_of_cells(world, honest):
    rng = np.random.default_rng(1)
    shuffled = World()
    for name in ("truth", "fresh", "reference"):
        setattr(shuffled, name, np.stack([rng.permutation(cells) for cells in getattr(world, name)]))
    after = shuffled.scores()
    cells = [column for column in honest if column in ("mae", "mse", "pearson", "energy_distance")]
    cells += [
        name for name in honest if name.startswith(("called", "overlap", "precision", "lfc", "within", "au"))
    ]
    cells += [name for name in honest if name.startswith(("discrimination", "direction", "count"))]
    pd.testing.assert_frame_equal(after[cells], honest[cells], rtol=1e-9)

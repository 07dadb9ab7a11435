"""PerturbDiff as a row of the benchmark: the rule for its law, and what its stored cells are named by."""

import numpy as np
import pytest

from hilbertcell.analyses import neural_predictors
from hilbertcell.analyses.benchmark_grid import NAMED_ONLY, model_names
from hilbertcell.analyses.neural_predictors import SMALL, perturbdiff_fitter, perturbdiff_key
from hilbertcell.analyses.predictors import Screen
from hilbertcell.data.anndata_io import read_populations


class OneMean:
    """Stands for a fit: normal cells, mean 3 and variance 4 in every gene."""

    def generate(self, populations, targets, num_cells, *, seed=0):
        rng = np.random.default_rng(seed)
        return [3.0 + 2.0 * rng.standard_normal((n, len(populations.genes))) for n in num_cells]


def test_its_law_is_one_population_with_the_noise_of_its_cells(screen, monkeypatch):
    monkeypatch.setattr("hilbertcell.inference.perturbdiff.fit.fit_perturbdiff", lambda *_, **__: OneMean())
    keys = {"perturbation": "drug", "control": "DMSO", "context": "cell_type", "batch": "donor"}
    populations = read_populations(screen, **keys)
    given = Screen(populations.select(populations.labels["is_control"].to_numpy()))
    predictor = perturbdiff_fitter(num_draws=4000)(Screen(populations))
    targets = populations.labels[~populations.labels["is_control"]].iloc[:3]
    draws = predictor.law(given, targets, 1)
    assert draws.shape == (4000, 3, 8)
    # 12 controls: one population of 12 cells, whose sample variance is 4 within a few tens of percent.
    assert 0.6 < draws.var(axis=0).mean() / (4 / 12) < 1.6
    own = draws.mean(axis=0)
    assert own.std() > 0.3  # populations differ by the noise of their cells
    assert [len(x) for x in predictor.cells(given, targets, np.array([4, 5, 6]), 0)] == [4, 5, 6]


def test_the_row_is_there_where_it_is_named(monkeypatch):
    assert "perturbdiff" in NAMED_ONLY
    assert callable(model_names)
    before = perturbdiff_key()
    assert before["hidden"] == SMALL["hidden"]
    assert len(before["source"]) == 64
    perturbdiff_key.cache_clear()
    monkeypatch.setitem(neural_predictors.SMALL, "hidden", 8)
    assert perturbdiff_key() != before
    perturbdiff_key.cache_clear()


def test_small_settings_are_settings():
    settings = neural_predictors.small_settings()
    assert not settings.batch_covariate  # held-out batches have no row
    with pytest.raises(ValueError, match="frozen"):
        settings.hidden = 3

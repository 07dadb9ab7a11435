"""NUTS: its coordinates change nothing, its draws are the program's posterior, `auto` is predictable."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.infer.util import log_density

from hilbertcell.inference import nuts
from hilbertcell.inference.calibration import simulate, small_experiment
from hilbertcell.inference.fit import fit
from hilbertcell.inference.nuts import Position, choose_inference
from hilbertcell.inference.predictive import QUICK_COMPILE
from hilbertcell.inference.settings import Settings
from hilbertcell.models.hidden_factors import hidden_factor_program

from .conftest import SETTINGS

quick = partial(jax.jit, compiler_options=QUICK_COMPILE)


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(True):
        experiment = small_experiment(num_batches=6, num_features=2)
        means = quick(lambda key: simulate(key, experiment)[1])(jax.random.key(3))
        yield experiment.args(means)


def test_the_coordinates_of_chains_are_an_exact_change_of_variables(problem):
    """Density in chain coordinates = density of the program's sites times the determinant of the Jacobian."""
    with jax.enable_x64(True):
        position = Position(problem)
        z = quick(lambda key: position.start(key, {}))(jax.random.key(0))
        flat, unravel = ravel_pytree(z)

        def sites(flat):
            return ravel_pytree(position.sites(unravel(flat)))[0]

        def densities(flat):
            plain = log_density(hidden_factor_program, problem, {}, position.sites(unravel(flat)))[0]
            return -position.potential(unravel(flat)), plain

        step = 1e-6 * np.eye(len(flat))
        moved = np.asarray(quick(jax.vmap(sites))(np.concatenate([flat + step, flat - step])))
        found, plain = quick(densities)(flat)
    jacobian = (moved[: len(flat)] - moved[len(flat) :]) / 2e-6
    # Central differences are good to about 1e-8 of each entry.
    assert float(found) == pytest.approx(float(plain) + np.linalg.slogdet(jacobian)[1], abs=1e-4)


def test_auto_takes_nuts_for_small_tables_only_and_says_why(problem):
    layout = problem[0]
    assert choose_inference("auto", layout)[0] == "nuts"
    wide = layout._replace(mean=np.zeros((6, 5, 2000)))
    method, reason = choose_inference("auto", wide)
    assert method == "svi"
    assert "6 batches x 5 populations x 2000 features" in reason
    assert choose_inference("nuts", wide) == ("nuts", "as set")
    assert choose_inference("svi", layout)[0] == "svi"


@pytest.mark.slow
def test_a_fit_by_nuts_mixes_repeats_itself_and_predicts(screen, d5, tmp_path, monkeypatch):
    monkeypatch.setattr(nuts, "NUM_WARMUP", 300)
    monkeypatch.setattr(nuts, "NUM_DRAWS", 150)
    train = screen.select((screen.labels["batch"] != "d5").to_numpy())
    settings = Settings(**SETTINGS.model_dump() | {"inference": "auto"})
    first, second = fit(train, seed=1, settings=settings), fit(train, seed=1, settings=settings)
    assert first.inference[0] == "nuts"
    for name, values in first.posterior.items():
        np.testing.assert_array_equal(values, second.posterior[name])
    assert first.sampling["rhat"].max() < 1.05
    assert first.sampling["ess"].min() > 100
    assert first.sampling["diverging"].mean() < 0.01
    draws = first.predict(d5, num_samples=300)
    error = draws["predictions"]["mean"].isel(chain=0) - draws["observed_data"]["control_mean"]
    assert np.isfinite(error).all()
    assert draws["sample_stats"]["diverging"].dims == ("chain", "draw")

"""SVI in Pyro by the same recipe, with what it may not touch; AutoGuides on the program."""

import jax
import numpy as np
import pytest
from numpyro import handlers

from hilbertcell.inference.svi import fit_svi as numpyro_svi

pytestmark = pytest.mark.usefixtures("pyro")
RECIPE = {"num_steps": 40, "learning_rate": 0.05, "num_particles": 1}


def test_with_the_noise_held_still_both_take_the_same_course(problem):
    """Adam, decay and clipping are one recipe: after 40 steps parameters and losses are the same."""
    import torch
    from pyro import poutine

    from hilbertcell.inference.pyro.svi import fit_svi

    noise = problem.noise()
    noise["_shared"] = 30.0 * noise["_shared"]  # gradients so large that they are clipped at first
    program, guide, args = problem.numpyro()
    fixed = handlers.substitute(guide, data=noise)
    expected = numpyro_svi(jax.random.key(0), program, fixed, args, params=problem.params(), **RECIPE)
    program, guide, args = problem.pyro()
    fixed = poutine.condition(guide, data={name: torch.tensor(value) for name, value in noise.items()})
    found = fit_svi(0, program, fixed, args, params=problem.params(), **RECIPE)
    assert expected.losses[0] > 1e3
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)  # clipping norms differ by 1e-6 / 50
    for name, value in expected.params.items():
        np.testing.assert_allclose(found.params[name], value, rtol=1e-6, atol=1e-8, err_msg=name)
    assert np.abs(found.params["feature_loc"] - problem.params()["feature_loc"]).max() > 0.1


def test_parameters_go_through_both_and_come_back(problem):
    """Steps of size zero: what is left is the way into the unconstrained space of either, and back."""
    from hilbertcell.inference.pyro.svi import fit_svi

    still = RECIPE | {"num_steps": 2, "learning_rate": 0.0}
    start = problem.params()
    through_pyro = fit_svi(0, *problem.pyro(), params=start, **still).params
    back = numpyro_svi(jax.random.key(0), *problem.numpyro(), params=through_pyro, **still).params
    assert set(start) == set(through_pyro) == set(back)
    for name, value in start.items():
        np.testing.assert_allclose(through_pyro[name], value, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(back[name], value, rtol=1e-12, err_msg=name)


def test_a_fit_depends_on_its_seed_alone_and_leaves_nothing_behind(problem, pyro, torch):
    from hilbertcell.inference.pyro.svi import fit_svi

    def state():
        return (
            torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist(), pyro.settings.get(),
            dict(pyro.get_param_store().items()),
        )  # fmt: skip

    pyro.param("mine", torch.tensor(3.0))
    try:
        before = state()
        first = fit_svi(1, *problem.pyro(), **RECIPE)
        torch.manual_seed(7)
        between = state()
        other = fit_svi(2, *problem.pyro(), **RECIPE)
        again = fit_svi(1, *problem.pyro(), **RECIPE)
        assert state() == between
        assert before[3:] == between[3:]
    finally:
        pyro.get_param_store().clear()
    np.testing.assert_array_equal(first.losses, again.losses)
    assert not np.allclose(first.losses, other.losses)
    assert "mine" not in first.params


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")  # Pyro says it beside our error
@pytest.mark.filterwarnings("ignore:there is no nan:RuntimeWarning")
def test_an_elbo_that_is_not_finite_is_an_error_that_names_the_step(problem):
    from hilbertcell.inference.pyro.svi import fit_svi

    program, guide, (design, outcome) = problem.pyro()
    with pytest.raises(FloatingPointError, match="not finite from step 0 of 40"):
        fit_svi(0, program, guide, (design * float("inf"), outcome), **RECIPE)

"""Fits and draws go from one library to the other: they predict, are saved and are gone on with all the same."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from hilbertcell.inference import fit as fit_module
from hilbertcell.inference.checkpoints import read_fit
from hilbertcell.inference.fit import Fit
from hilbertcell.inference.fit import infer as numpyro_infer

from ..conftest import SETTINGS, make_screen, populations_of

pytestmark = pytest.mark.usefixtures("pyro")
STEPS = 40


@pytest.fixture(scope="module")
def donors():
    """Four donors for a fit, one that it does not see."""
    screen = populations_of(make_screen(num_batches=5))
    unseen = (screen.labels["batch"] == "d4").to_numpy()
    return screen.select(~unseen), screen.select(unseen)


@pytest.fixture(scope="module")
def by_pyro(donors, pyro) -> Fit:
    """A fit that Pyro made from the start."""
    from hilbertcell.inference.pyro.fit import infer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "infer", lambda start, progress: start)
        start = fit_module.fit(donors[0], seed=1, settings=SETTINGS.model_copy(update={"num_steps": STEPS}))
    assert not start.params
    return infer(start)


def shapes(tree):
    return {
        f"{group.path}/{name}": dict(values.sizes)
        for group in tree.subtree
        for name, values in group.data_vars.items()
    }


@pytest.mark.slow
def test_a_fit_is_gone_on_with_in_either_and_its_draws_are_one_data_tree(by_pyro, donors, tmp_path):
    from hilbertcell.inference.pyro.fit import infer

    assert len(by_pyro.losses) == STEPS
    assert np.abs(by_pyro.params["feature_loc"]).max() > 0.1  # it starts from zero
    still = replace(by_pyro, settings=by_pyro.settings.model_copy(update={"learning_rate": 1e-9}))
    on = infer(numpyro_infer(still))
    assert len(on.losses) == 3 * STEPS
    np.testing.assert_array_equal(on.losses[:STEPS], by_pyro.losses)
    for name, value in by_pyro.params.items():
        np.testing.assert_allclose(on.params[name], value, atol=1e-6, err_msg=name)
    on.save(tmp_path / "fit")
    again = read_fit(tmp_path / "fit")
    np.testing.assert_array_equal(again.losses, on.losses)
    tree = on.predict(donors[1], num_samples=10)
    np.testing.assert_array_equal(
        again.predict(donors[1], num_samples=10)["predictions"]["mean"], tree["predictions"]["mean"]
    )


@pytest.mark.parametrize("kind", ["AutoNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"])
def test_autoguides_learn_and_their_draws_predict(by_pyro, donors, pyro, torch, kind):
    from pyro.infer import Predictive, autoguide

    from hilbertcell.inference.pyro.fit import program_args, with_draws
    from hilbertcell.inference.pyro.svi import draw_sites, fit_svi
    from hilbertcell.models.pyro.hidden_factors import hidden_factor_program

    args = program_args(by_pyro)
    guide = getattr(autoguide, kind)(
        hidden_factor_program, init_loc_fn=autoguide.init_to_median(num_samples=5)
    )
    result = fit_svi(0, hidden_factor_program, guide, args, num_steps=60, learning_rate=0.05, num_particles=1)
    assert result.losses[-10:].mean() < result.losses[:10].mean() - 100
    draws = draw_sites(0, guide, args, 12)
    assert not list(pyro.get_param_store().keys())
    fitted = with_draws(by_pyro, draws)
    with jax.enable_x64(True):
        sites, _ = fitted.sample_globals(jax.random.split(jax.random.key(0), 5))
    assert (np.asarray(sites["slope"])[:, None] == draws["slope"].numpy()).all(-1).any(1).all()
    simulated = Predictive(hidden_factor_program, draws, return_sites=["response"])(*args[:-1])
    assert simulated["response"].shape == (12, *args[-1].shape)
    if kind == "AutoNormal":  # what it costs to predict is spent once
        one, two = (fit.predict(donors[1], num_samples=10) for fit in (by_pyro, fitted))
        assert shapes(one).keys() == shapes(two).keys()
        same = {name: sizes for name, sizes in shapes(one).items() if name != "/sample_stats/elbo"}
        assert same == {name: shapes(two)[name] for name in same}


def test_draws_of_another_program_are_refused_by_name(by_pyro):
    import torch

    from hilbertcell.inference.pyro.fit import with_draws

    with pytest.raises(
        ValueError, match=r"log_scale_mean is missing.*slope has shape \(5, 2\), expected \(draws, 11,\)"
    ):
        with_draws(by_pyro, {"slope": torch.zeros(5, 2)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"posterior": {"slope": np.zeros(1)}}, "by NUTS"),
        ({"diffusion": object()}, "diffusion"),
        ({"settings": SETTINGS.model_copy(update={"objective": "iwae"})}, "'iwae'"),
    ],
)
def test_fits_that_pyro_cannot_go_on_with_are_refused(by_pyro, changes, message):
    from hilbertcell.inference.pyro.fit import infer

    with pytest.raises(ValueError, match=message):
        infer(replace(by_pyro, **changes))

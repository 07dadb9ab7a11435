"""One family in two languages: same parameters and noise, same values, densities and ELBO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

from hilbertcell.inference import guides
from hilbertcell.inference.calibration import simulate, small_experiment
from hilbertcell.inference.predictive import QUICK_COMPILE
from hilbertcell.inference.starting_values import starting_values
from hilbertcell.models.hidden_factors import hidden_factor_program

pytestmark = pytest.mark.usefixtures("pyro")


def of_numpyro(program, guide, args, params, noise):
    """Values of the sites and the ELBO of one draw of the guide."""

    def run(params, noise):
        fixed = handlers.substitute(handlers.seed(guide, 0), data=params | noise)
        trace = handlers.trace(fixed).get_trace(*args)
        values = {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}
        elbo = log_density(program, args, {}, values)[0] - log_density(fixed, args, {}, noise)[0]
        return values, elbo

    run = jax.jit(run, compiler_options=QUICK_COMPILE)
    return jax.tree.map(np.asarray, run(*(jax.tree.map(jnp.asarray, given) for given in (params, noise))))


def of_pyro(pyro, program, guide, args, params, noise):
    import torch
    from pyro import poutine
    from pyro.infer import Trace_ELBO

    from hilbertcell.inference.pyro.svi import load_params

    data = {name: torch.tensor(value) for name, value in noise.items()}
    with pyro.get_param_store().scope(), torch.no_grad():
        load_params(params, "cpu")
        fixed = poutine.condition(guide, data=data)
        trace = poutine.trace(fixed).get_trace(*args)
        values = {name: trace.nodes[name]["value"].numpy() for name in trace.nodes if name[0] != "_"}
        return values, -Trace_ELBO().loss(program, fixed, *args)


def same(found, expected):
    for name in set(expected[0]) - {"_shared", "_feature"}:
        np.testing.assert_allclose(found[0][name], expected[0][name], rtol=1e-12, err_msg=name)
    assert found[1] == pytest.approx(float(expected[1]), rel=1e-12)


@pytest.mark.parametrize("coupled", [True, False])
def test_same_parameters_and_noise_give_the_same_draw_and_elbo(problem, pyro, monkeypatch, coupled):
    params, noise = problem.params(), problem.noise()
    if not coupled:
        monkeypatch.setattr(guides, "_MAX_COUPLINGS", 5)  # 3 features x 2 weights x 2 scales
        params.pop("feature_common")
    expected = of_numpyro(*problem.numpyro(), params, noise)
    same(of_pyro(pyro, *problem.pyro(), params, noise), expected)


@pytest.mark.slow  # XLA takes half a minute on busy cores
def test_the_guide_of_the_hidden_factor_program_is_the_same(pyro, monkeypatch):
    """All sites of the program, wide ones among them, in the places where NumPyro's guide has them."""
    from hilbertcell.inference.pyro.guides import BlockGuide
    from hilbertcell.models.pyro import hidden_factors
    from hilbertcell.models.pyro.arguments import as_tensors

    monkeypatch.setattr(guides, "_MAX_BLOCK", 10)
    with jax.enable_x64(True):
        experiment = small_experiment()
        args = experiment.args(simulate(jax.random.key(0), experiment)[1])
        starts = dict(zip(("initial", "initial_sd"), starting_values(args, 0), strict=True))
        guide = guides.BlockGuide(hidden_factor_program, *args, **starts)
        rng = np.random.default_rng(0)
        params = {
            name: np.asarray(value) * np.exp(0.2 * rng.standard_normal(value.shape))
            + (0.1 * rng.standard_normal(value.shape) if "loc" in name or "common" in name else 0.0)
            for name, value in guide.initial_params().items()
        }
        assert params["feature_sd"].size
        noise = {"_shared": len(params["shared_loc"]), "_feature": params["feature_loc"].shape}
        noise = {name: rng.standard_normal(shape) for name, shape in noise.items()}
        expected = of_numpyro(hidden_factor_program, guide, args, params, noise)
    tensors = as_tensors(args)
    twin = BlockGuide(hidden_factors.hidden_factor_program, *tensors, **starts)
    assert {name: value.shape for name, value in twin.layout.initial_params().items()} == {
        name: value.shape for name, value in params.items()
    }
    same(of_pyro(pyro, hidden_factors.hidden_factor_program, twin, tensors, params, noise), expected)

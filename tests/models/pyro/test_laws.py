"""Laws that every program with a twin obeys: the table is in `table.py`."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from scipy.stats import ks_2samp

from hilbertcell.inference.predictive import QUICK_COMPILE

from .table import CASES, PROGRAMS, Program

RTOL = 1e-9  # in float64; asked for is 1e-6
NUM_DRAWS = 1000
FALSE_ALARM = 1e-4  # of one comparison of samples, over all statistics of all sites

SAMPLED = ("two contexts", "random features", "no factors")

pytestmark = pytest.mark.usefixtures("pyro")


def rows(cases: Iterable[str], slow: Callable[[Program], Collection[str]]) -> list[Any]:
    """Every program with each of `cases`; those that `slow` names of a program are for `make test-slow`."""
    return [
        pytest.param(
            program, CASES[case], id=f"{name}-{case}", marks=[pytest.mark.slow] * (case in slow(program))
        )
        for name, program in PROGRAMS.items()
        for case in cases
    ]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def numpyro_sites(trace: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: site for name, site in trace.items() if site["type"] == "sample"}


def pyro_sites(trace: Any) -> dict[str, dict[str, Any]]:
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    return {name: site for name, site in sites.items() if type(site["fn"]).__name__ != "_Subsample"}


def kind(site: dict[str, Any]) -> tuple[Any, ...]:
    """Shape of the value, of the event, and the plates: all of a site but its numbers."""
    plates = [(frame.name, frame.dim, frame.size) for frame in site["cond_indep_stack"]]
    shape = tuple(site["value"].shape)
    return shape, shape[len(shape) - site["fn"].event_dim :], plates


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of two arrays in units of the largest entry."""
    assert found.shape == expected.shape
    scale = np.abs(expected).max(initial=0.0)
    return (
        float(np.abs(found - expected).max(initial=0.0) / scale)
        if scale
        else float(np.abs(found).max(initial=0.0))
    )


@pytest.mark.parametrize(("program", "case"), rows(CASES, lambda program: program.slow))
def test_sites_densities_and_gradients_agree(program, case, torch):
    """At a draw of the prior, site by site: what it is, its log density, and the gradient of all with respect to it."""
    from pyro import poutine

    from hilbertcell.models.pyro.arguments import as_tensors

    arguments = program.arguments(case)
    tensors = as_tensors(arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        drawn = pyro_sites(poutine.trace(program.pyro()).get_trace(*tensors))
    values = {name: site["value"] for name, site in drawn.items() if not site["is_observed"]}
    kinds: dict[str, tuple[Any, ...]] = {}

    def densities(values: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        traced = handlers.trace(handlers.substitute(handlers.seed(program.numpyro, 0), data=values))
        sites = numpyro_sites(traced.get_trace(*arguments))
        kinds.update((name, kind(site)) for name, site in sites.items())
        of_site = {name: site["fn"].log_prob(site["value"]) for name, site in sites.items()}
        return sum(value.sum() for value in of_site.values()), of_site

    differentiate = jax.jit(jax.value_and_grad(densities, has_aux=True), compiler_options=QUICK_COMPILE)
    (_, expected), gradients = differentiate({name: jnp.asarray(value) for name, value in values.items()})

    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    trace = poutine.trace(poutine.condition(program.pyro(), data=leaves)).get_trace(*tensors)
    trace.compute_log_prob()
    found = pyro_sites(trace)
    assert list(found) == list(kinds)
    for name, site in found.items():
        assert kind(site) == kinds[name], name
        assert site["value"].dtype == torch.float64, name
        assert relative(site["log_prob"].detach().numpy(), np.asarray(expected[name])) < RTOL, name
    total = sum(site["log_prob_sum"] for site in found.values())
    for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        assert relative(gradient.numpy(), np.asarray(gradients[name])) < RTOL, name


@pytest.mark.parametrize(
    ("program", "case"), rows(SAMPLED, lambda program: SAMPLED if program.slow else SAMPLED[1:])
)
def test_samples_have_one_law(program, case, pyro, torch, monkeypatch):
    """Two-sample Kolmogorov-Smirnov tests of entries of every site and of its mean square."""
    from pyro import poutine

    from hilbertcell.models.pyro.arguments import as_tensors

    # torch draws this in place, which `vmap` cannot do; the same draws otherwise.
    standard_normal = lambda shape, dtype, device: torch.randn(shape, dtype=dtype, device=device)
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", standard_normal)
    arguments = program.arguments(case)[:-1]
    tensors = as_tensors(arguments)

    def one_of_pyro(_: Any) -> dict[str, Any]:
        sites = pyro_sites(poutine.trace(program.pyro()).get_trace(*tensors))
        return {name: site["value"] for name, site in sites.items()}

    def one_of_numpyro(key: jax.Array) -> dict[str, jax.Array]:
        trace = handlers.trace(handlers.seed(program.numpyro, key)).get_trace(*arguments)
        return {name: site["value"] for name, site in numpyro_sites(trace).items()}

    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        torch.manual_seed(5)
        found = torch.vmap(one_of_pyro, randomness="different")(torch.arange(NUM_DRAWS))
    keys = jax.random.split(
        jax.random.key(5, impl="rbg"), NUM_DRAWS
    )  # the usual generator compiles for ten seconds
    expected = jax.vmap(one_of_numpyro)(keys)
    assert set(found) == set(expected)
    pairs = {}
    for name, draws in found.items():
        both = [np.asarray(values).reshape(NUM_DRAWS, -1) for values in (draws, expected[name])]
        pairs |= {f"{name}[{i}]": [values[:, i] for values in both] for i in (0, both[0].shape[1] - 1)}
        pairs[f"{name} squared"] = [(values**2).mean(1) for values in both]
    p_values = {name: ks_2samp(*pair).pvalue for name, pair in pairs.items()}
    worst = min(p_values, key=p_values.__getitem__)
    assert p_values[worst] > FALSE_ALARM / len(p_values), worst

"""One pass over draws of the unknowns: replicated tables, microenvironments, densities and what else checks need."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from numpyro import handlers

from hilbertcell.inference.diagnostics.result import Result
from hilbertcell.inference.diagnostics.tables import Table
from hilbertcell.inference.predictive import DRAW_BLOCK, align, batch_log_density, draw_batches
from hilbertcell.models.hidden_factors import hidden_factor_program
from hilbertcell.models.microenvironment import Globals, Latents, Observations, draw_response

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

# Power-scaling sensitivity above which a quantity leans on the prior (Kallioinen et al. 2024).
SENSITIVE = 0.05


class PosteriorDraws(NamedTuple):
    """S draws of a fit, genes only, standardised.

    Attributes:
        replicates: (S, P, G) tables that the program makes in the place of the training table, float32.
        microenvironment: (S, B, K), aligned.
        log_likelihood: (S, B).
        log_prior: (S,) of the unknowns that features share: scales of scales, ratios, amplitudes.
        scalars: (S,) summaries by name.

    """

    replicates: np.ndarray
    microenvironment: np.ndarray
    log_likelihood: np.ndarray
    log_prior: np.ndarray
    scalars: dict[str, np.ndarray]


def posterior_draws(fit: "Fit", table: Table, num_draws: int, seed: int) -> PosteriorDraws:
    """Draw; `table` is that of the training populations."""
    layout = jax.tree.map(jnp.asarray, fit.table.observations)
    slots, num_genes = fit.table.rows >= 0, len(fit.genes)
    replicates = table.noise(np.random.default_rng(seed), num_draws)
    parts: list[dict[str, np.ndarray]] = []
    with jax.enable_x64(True):

        @jax.jit
        def sample(keys: Array, globals_: Globals, layout: Observations) -> Array:
            return jax.lax.map(lambda own: latent_table(own[0], own[1], layout), (keys, globals_))

        log_prior = _log_prior(fit)
        no_responses = (jnp.zeros(0, int), jnp.zeros(0, int), jnp.zeros((0, 0), int))
        keys = jax.random.split(jax.random.key(seed), (3, num_draws))
        for start in range(0, num_draws, DRAW_BLOCK):
            block = slice(start, min(start + DRAW_BLOCK, num_draws))
            sites, globals_ = fit.sample_globals(keys[0, block])
            latent = np.asarray(sample(keys[1, block], globals_, layout))
            replicates[block, fit.table.rows[slots]] += latent[:, slots, :num_genes]
            parts.append(
                {
                    "microenvironment": np.asarray(
                        draw_batches(keys[2, block], globals_, layout, *no_responses)[0]
                    ),
                    "log_likelihood": np.asarray(batch_log_density(globals_, layout)),
                    "log_prior": np.asarray(log_prior(sites)),
                    **_scalars(globals_, num_genes),
                }
            )
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    own = ("microenvironment", "log_likelihood", "log_prior")
    return PosteriorDraws(
        replicates, align(whole["microenvironment"])[0], whole["log_likelihood"], whole["log_prior"],
        {name: values for name, values in whole.items() if name not in own},
    )  # fmt: skip


def latent_table(key: Array, globals_: Globals, layout: Observations) -> Array:
    """Latent means (B, C + J, D) of batches drawn from the generative process, nothing given but the layout."""
    num_factors = globals_.baseline_loading.shape[1]

    def one(key: Array, condition: Array, context: Array) -> Array:
        key_u, key_d, key_x, key_response = jax.random.split(key, 4)
        u = jax.random.normal(key_u, (num_factors,))
        d = globals_.batch_scale * jax.random.normal(key_d, globals_.batch_scale.shape)
        x = globals_.baseline_loading @ u + globals_.baseline_scale * jax.random.normal(
            key_x, globals_.alpha.shape
        )
        latents = Latents(u, d, globals_.alpha + x)
        response = draw_response(key_response, globals_, latents, condition, context, None)
        return jnp.concatenate([latents.control_mean, response])

    return jax.vmap(one)(jax.random.split(key, len(layout.mean)), layout.condition, layout.context)


def _log_prior(fit: "Fit") -> Callable[[dict[str, Array]], Array]:
    """Compiled map from sites (S, ...) to the log prior density (S,) of those that features share."""
    args = (*fit.program_args[:-1], None)

    def one(sites: dict[str, Array]) -> Array:
        seeded = handlers.seed(hidden_factor_program, 0)
        trace = handlers.trace(handlers.substitute(seeded, data=sites)).get_trace(*args)
        return sum(
            site["fn"].log_prob(site["value"]).sum()
            for name, site in trace.items()
            if site["type"] == "sample" and name != "response" and not site["cond_indep_stack"]
        )

    return jax.jit(jax.vmap(one))


def _scalars(globals_: Globals, num_genes: int) -> dict[str, np.ndarray]:
    genes = slice(0, num_genes)
    means = {
        "slope": globals_.slope[:, genes].mean(-1),
        "effect size": jnp.sqrt((globals_.effect[..., genes] ** 2).mean((-2, -1))),
        "baseline scale": jnp.exp(jnp.log(globals_.baseline_scale[..., genes]).mean((-2, -1))),
        "response scale": jnp.exp(jnp.log(globals_.response_scale[..., genes]).mean((-2, -1))),
        "batch scale": jnp.exp(jnp.log(globals_.batch_scale[:, genes]).mean(-1)),
        "loading on response": jnp.sqrt((globals_.response_loading[:, genes] ** 2).sum(-1).mean(-1)),
    }
    return {name: np.asarray(values) for name, values in means.items() if np.ptp(np.asarray(values)) > 0}


def posterior_tree(draws: PosteriorDraws, batches: list[str]) -> xr.DataTree:
    """Draws as ArviZ takes them: groups posterior, log_prior, log_likelihood with dims (chain, draw, ...)."""
    of = lambda values, *dims: (("chain", "draw", *dims), values[None])
    posterior = {name: of(values) for name, values in draws.scalars.items()}
    posterior["microenvironment"] = of(draws.microenvironment, "batch", "factor")
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset(posterior, {"batch": batches}),
            "log_prior": xr.Dataset({"shared": of(draws.log_prior)}),
            "log_likelihood": xr.Dataset({"response": of(draws.log_likelihood, "batch")}, {"batch": batches}),
        }
    )


def sensitivity(tree: xr.DataTree, names: list[str]) -> Result:
    """Does an answer lean on the prior? Largest change under power-scaling of the prior of what features share.

    Kallioinen et al. (2024), on draws of the fit as if they were exact. A threshold, no test: never more than "watch".
    """
    found = {
        group: {
            name: float(values)
            for name, values in arviz.psense(tree, var_names=names, group=group).data_vars.items()
        }
        for group in ("prior", "likelihood")
    }
    worst = max(found["prior"], key=lambda name: found["prior"][name])
    leans = found["prior"][worst] > SENSITIVE
    details = {f"{name}, {group}": value for group, values in found.items() for name, value in values.items()}
    return Result(found["prior"][worst], None, "watch" if leans else "ok", worst if leans else "", details)

"""The No-U-Turn sampler on the hidden-factor program: a pure function of arrays, vmapped over chains and data sets.

Hoffman & Gelman (2014), windowed adaptation as in Stan. Means and effects of small and of large populations differ
in how well they are known by orders of magnitude, and how well depends on the scales: neither centred nor whitened
coordinates suit them all. Chains therefore move `alpha` and `effect` in units of their rough conditional law given
the scales; the change of variables is exact, the program stays as it is.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.distributions import biject_to
from numpyro.infer.hmc import hmc
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import constrain_fn, potential_energy

from hilbertcell.models.hidden_factors import hidden_factor_program
from hilbertcell.models.microenvironment import Globals, Observations, PopulationMeans, draw_latents

NUM_CHAINS = 4
NUM_WARMUP = 500
NUM_DRAWS = 250  # per chain
_MAX_TREE_DEPTH = 7
# What `auto` allows, and what it reckons with: leapfrog steps of a usual trajectory; seconds of compiling, of a step
# of all chains, and of a step per slot and feature. Measured on one core.
TIME_LIMIT = 120.0
_USUAL_STEPS = 80
_SECONDS = (20.0, 3e-4, 2.1e-7)
# Spread of the starting points of chains, in unconstrained (mostly standard normal) units.
_JITTER = 0.3

# Slopes in units of their prior given its spread: the neck of a funnel otherwise.
_program = handlers.reparam(hidden_factor_program, config={"slope": LocScaleReparam(0.0)})


class Chain(NamedTuple):
    """Draws of one chain and what the sampler says about them; S draws."""

    sites: dict[str, Array]  # (S, ...) sites of the program, constrained
    diverging: Array  # (S,) bool, any of the steps since the last draw kept
    acceptance: Array  # (S,) mean acceptance probability of the trajectories
    num_steps: Array  # (S,) leapfrog steps


class Sampled(NamedTuple):
    """Draws of all chains with their diagnostics, numpy."""

    sites: dict[str, np.ndarray]  # (chain, draw, ...)
    stats: dict[str, np.ndarray]  # diverging, acceptance_rate, n_steps (chain, draw); rhat, ess (invariant)


# Of these the worst entry is reported: `u` alone is known up to sign and rotation.
INVARIANTS = ("Gamma u", "B Gamma u + Lambda u", "alpha", "effect", "log density")


def choose_inference(wanted: Literal["svi", "nuts", "auto"], layout: Observations) -> tuple[str, str]:
    """Method for a table of this shape, and why: "auto" means NUTS where it should take `TIME_LIMIT` at most."""
    if wanted != "auto":
        return wanted, "as set"
    num_batches, num_slots, num_features = layout.mean.shape
    compiling, step, each = _SECONDS
    size = num_batches * num_slots * num_features
    steps = (NUM_WARMUP + NUM_DRAWS) * _USUAL_STEPS
    seconds = compiling + steps * (step + NUM_CHAINS * size * each)
    reason = (
        f"NUTS was reckoned to take {seconds:.0f} s for {num_batches} batches x {num_slots} populations x "
        f"{num_features} features; auto allows {TIME_LIMIT:.0f} s"
    )
    return ("nuts" if seconds <= TIME_LIMIT else "svi"), reason


def run_nuts(key: Array, args: tuple[Any, ...], initial: dict[str, np.ndarray]) -> Sampled:
    """Chains side by side on one data set; call it where float64 is enabled."""
    key_chains, key_latents = jax.random.split(key)

    def one(key: Array) -> Chain:
        return sample_chain(
            key, args, initial, num_warmup=NUM_WARMUP, num_draws=NUM_DRAWS, max_tree_depth=_MAX_TREE_DEPTH
        )

    chains = jax.jit(jax.vmap(one))(jax.random.split(key_chains, NUM_CHAINS))
    keys = jax.random.split(key_latents, (NUM_CHAINS, NUM_DRAWS))
    invariants = jax.jit(jax.vmap(jax.vmap(lambda k, s: _invariants(k, args, s))))(keys, chains.sites)
    found = [np.asarray(invariants[name]) for name in INVARIANTS]  # all 0 where the program has no factors
    stats = {
        "diverging": np.asarray(chains.diverging),
        "acceptance_rate": np.asarray(chains.acceptance),
        "n_steps": np.asarray(chains.num_steps),
        "rhat": np.array([np.max(split_gelman_rubin(x)) if x.any() else 1.0 for x in found]),
        "ess": np.array(
            [np.min(effective_sample_size(x)) if x.any() else x.shape[0] * x.shape[1] for x in found]
        ),
    }
    return Sampled({name: np.asarray(value) for name, value in chains.sites.items()}, stats)


def _invariants(key: Array, args: tuple[Any, ...], sites: dict[str, Array]) -> dict[str, Array]:
    """Quantities (flat) that do not depend on the orientation of `u`, under one draw."""
    layout, means = args[0]._replace(mean=args[-1]), args[-1]
    globals_ = handlers.substitute(handlers.seed(hidden_factor_program, 0), data=sites)(*args)
    keys = jax.random.split(key, means.shape[0])
    u = jax.vmap(lambda k, batch: draw_latents(k, globals_, batch).microenvironment)(keys, layout)
    gamma_u = u @ globals_.baseline_loading.T
    values = (
        gamma_u,
        gamma_u * globals_.slope + u @ globals_.response_loading.T,
        globals_.alpha,
        globals_.effect,
        PopulationMeans(globals_, layout).log_prob(means).sum(),
    )
    return {name: value.ravel() for name, value in zip(INVARIANTS, values, strict=True)}


def sample_chain(
    key: Array,
    args: tuple[Any, ...],
    initial: dict[str, Array],
    *,
    num_warmup: int,
    num_draws: int,
    thinning: int = 1,
    target_acceptance: float = 0.8,
    max_tree_depth: int = 8,
) -> Chain:
    """One chain of NUTS on `hidden_factor_program(*args)`, to be jitted and vmapped by the caller.

    Args:
        key: random key.
        args: arguments of the program, observed means included.
        initial: constrained starting values of sites; others start in the middle of their prior.
        num_warmup: steps of adaptation, dropped; a multiple of `thinning`.
        num_draws: draws kept.
        thinning: steps per draw kept.
        target_acceptance: acceptance probability that the step size aims at.
        max_tree_depth: log2 of the longest trajectory.
    """
    position = Position(args)
    key_start, key_chain = jax.random.split(key)
    start = position.start(key_start, initial)
    init, step = hmc(position.potential, algo="NUTS")
    state = init(
        start,
        num_warmup,
        target_accept_prob=target_acceptance,
        max_tree_depth=max_tree_depth,
        rng_key=key_chain,
    )

    def draw(state: Any, _: None) -> tuple[Any, tuple[Array, ...]]:
        def one(state: Any, _: None) -> tuple[Any, tuple[Array, ...]]:
            state = step(state)
            return state, (state.diverging, state.accept_prob, state.num_steps)

        state, (diverging, acceptance, num_steps) = jax.lax.scan(one, state, None, length=thinning)
        return state, (state.z, diverging.any(), acceptance.mean(), num_steps.sum())

    # One loop for warm-up and draws: the step is compiled once, and that is what compiling takes.
    _, kept = jax.lax.scan(draw, state, None, length=num_warmup // thinning + num_draws)
    z, *statistics = jax.tree.map(lambda leaf: leaf[-num_draws:], kept)
    return Chain(jax.vmap(position.sites)(z), *statistics)


class Position:
    """Coordinates in which chains move: unconstrained sites, `alpha` and `effect` in units of `_alpha_guess` etc."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        """Trace the program for its sites, abstractly."""
        self.args = args
        self._sites: dict[str, tuple[Any, tuple[int, ...]]] = {}  # transform, unconstrained shape

        def collect() -> None:
            for name, site in handlers.trace(handlers.seed(_program, 0)).get_trace(*args).items():
                if site["type"] == "sample" and not site["is_observed"]:
                    transform = biject_to(site["fn"].support)
                    self._sites[name] = transform, transform.inverse_shape(site["value"].shape)

        jax.eval_shape(collect)

    def start(self, key: Array, initial: dict[str, Array]) -> dict[str, Array]:
        """A random position about `initial` (constrained) where it says something, the middle of the prior elsewhere."""
        z = {}
        for i, (name, (transform, shape)) in enumerate(self._sites.items()):
            known = name in initial and name not in ("alpha", "effect")
            middle = transform.inv(jnp.asarray(initial[name], float)) if known else jnp.zeros(shape)
            z[name] = middle + _JITTER * jax.random.normal(jax.random.fold_in(key, i), shape)
        return z

    def potential(self, z: dict[str, Array]) -> Array:
        """Minus the log density of the program at a position, volume of the change of variables included."""
        unconstrained, volume = self._place(z)
        return potential_energy(_program, self.args, {}, unconstrained) - volume

    def sites(self, z: dict[str, Array]) -> dict[str, Array]:
        """Values of the program's latent sites at a position."""
        sites = constrain_fn(_program, self.args, {}, self._place(z)[0], return_deterministic=True)
        return {name: value for name, value in sites.items() if name != "slope_decentered"}

    def _place(self, z: dict[str, Array]) -> tuple[dict[str, Array], Array]:
        """Unconstrained sites at a position, and the log volume of the map."""
        values = {name: transform(z[name]) for name, (transform, _) in self._sites.items()}
        values |= {"alpha": jnp.zeros_like(z["alpha"]), "effect": jnp.zeros_like(z["effect"])}
        globals_ = handlers.substitute(handlers.seed(_program, 0), data=values)(*self.args)
        mean, sd = _alpha_guess(self.args, globals_)
        alpha = mean + sd * z["alpha"].T
        volume = jnp.log(sd).sum()
        mean, sd = _effect_guess(self.args, globals_, values["effect_amplitude"], alpha)
        effect = mean + sd * z["effect"].T
        return z | {"alpha": alpha.T, "effect": effect.T}, volume + jnp.log(sd).sum()


def _alpha_guess(args: tuple[Any, ...], globals_: Globals) -> tuple[Array, Array]:
    """Mean and sd (C, D) of `alpha` were controls of different batches all that is known of it."""
    layout, _, _, _, _, means = args
    num_contexts = globals_.alpha.shape[0]
    observed = layout.observed[:, :num_contexts, None].astype(means.dtype)
    spread = globals_.baseline_scale**2 + (globals_.baseline_loading**2).sum(-1)
    weight = observed / (spread + layout.noise[:, :num_contexts])
    precision = weight.sum(0) + 1.0 / 9.0  # prior of the program
    return (weight * means[:, :num_contexts]).sum(0) / precision, precision**-0.5


def _effect_guess(
    args: tuple[Any, ...], globals_: Globals, amplitudes: Array, alpha: Array
) -> tuple[Array, Array]:
    """Mean and sd (E, D) of `effect` given `alpha`, were conditions independent and batches one variance."""
    layout, kernels, _, _, _, means = args
    num_contexts, num_conditions = globals_.alpha.shape[0], globals_.effect.shape[0]
    observed = layout.observed[..., None].astype(means.dtype)

    def of_slots(values: Array) -> Array:
        return jnp.take_along_axis(values, layout.context[..., None], 1)

    spread = globals_.baseline_scale**2 + (globals_.baseline_loading**2).sum(-1)
    gain = observed[:, :num_contexts] * spread / (spread + layout.noise[:, :num_contexts])
    x, left = gain * (means[:, :num_contexts] - alpha), spread * (1.0 - gain)
    strength = globals_.strength[layout.condition][..., None]
    own = 1.0 + strength * globals_.slope
    residual = means[:, num_contexts:] - alpha[layout.context] - own * of_slots(x)
    response = globals_.response_scale[layout.context] ** 2
    shared = globals_.batch_scale**2 + (globals_.response_loading**2).sum(-1)
    variance = strength**2 * (response + shared) + own**2 * of_slots(left) + layout.noise[:, num_contexts:]
    weight = observed[:, num_contexts:] / variance

    def per_condition(values: Array) -> Array:
        flat = values.reshape(-1, values.shape[-1])
        return jax.ops.segment_sum(flat, layout.condition.ravel(), num_conditions)

    diagonal = jnp.tensordot(amplitudes**2, jnp.diagonal(kernels, axis1=1, axis2=2), 1)
    precision = per_condition(weight) + 1.0 / (diagonal[:, None] * globals_.effect_scale**2)
    return per_condition(weight * residual) / precision, precision**-0.5

"""Drawing a population of which something was observed: few cells, some genes, other conditions of its batch.

An observation is `y = H v + N(0, R)`. For the hidden-factor program everything is in closed form
(`condition_gaussian`). With a network there are three ways:

- `start_at_cells`: n cells put a population at level `1 / sqrt(n)`; the reverse SDE goes on from there. Exact in law for
  an exact denoiser when the noise of the cells is `sigma^2 I`; what topping the noise up to that costs is lost.
- `twisted_smc`: any observation. Particles follow the program's exact conditional and are weighted for what the network
  adds (twisted diffusion sampling, Wu et al. 2023). Weights are constant, and all is exact, where the network is zero.
- `reweight_latents`: several observed conditions of one batch speak about its latents. Draws from the program's
  posterior get the weight by which the network's evidence differs from the program's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.special import logsumexp

from hilbertcell.inference.samplers import Sampler, ancestral_sampler, ancestral_transition, sample
from hilbertcell.models.denoisers import (
    Condition,
    Denoiser,
    posterior_sd,
    root,
    shrinkage,
)
from hilbertcell.models.forward_processes import process_of, top_up

_LOG_2PI = 1.8378770664093453
_RESAMPLE_BELOW = 0.5  # of the particles: the usual threshold


class Observation(NamedTuple):
    """`y = H v + N(0, R)`."""

    value: Array  # (Q,) y
    matrix: Array  # (Q, D) H
    noise: Array  # (Q, Q) R, positive definite


def observe_cells(v_hat: Array, noise: Array) -> Observation:
    """The mean embedding `v_hat` (D,) of a population's cells with noise covariance `noise` (D, D) = W / n."""
    return Observation(v_hat, jnp.eye(len(v_hat), dtype=v_hat.dtype), noise)


def condition_gaussian(condition: Condition, observation: Observation) -> tuple[Condition, Array]:
    """The program's law of v given an observation, again as a condition, and the log density of `y` ().

    Features stay: a network was trained for laws without observations, so pair the result with `gaussian_denoiser`
    only. Several conditions at once: let v be their points one after another.
    """
    load = observation.matrix @ condition.vectors
    covariance = _predicted(load, condition.values) + observation.noise
    innovation = observation.value - observation.matrix @ condition.mean
    cross = load * condition.values
    solved = cho_solve(cho_factor(covariance, lower=True), jnp.column_stack([innovation, cross]))
    mean = condition.mean + condition.vectors @ (cross.T @ solved[:, 0])
    values, vectors = jnp.linalg.eigh(jnp.diag(condition.values) - cross.T @ solved[:, 1:])
    updated = Condition(mean, condition.vectors @ vectors, jnp.clip(values, 0.0), condition.features)
    return updated, _log_normal(innovation, covariance)


def start_at_cells(
    key: Array,
    denoiser: Denoiser,
    condition: Condition,
    v_hat: Array,
    noise: Array,
    sigma: Array,
    sampler: Sampler = ancestral_sampler,
) -> Array:
    """A draw (D,) of a population of which cells were seen: the reverse SDE from the level of the cells.

    Args:
        key: random key.
        denoiser: an estimate of the posterior mean.
        condition: what else is given.
        v_hat: (D,) mean embedding of the cells.
        noise: (D, D) its noise covariance, W / n.
        sigma: the level, at least `models.forward_processes.level(n, W)`.
        sampler: how to go down; must be stochastic.

    Raises:
        ValueError: the sampler solves the flow, which maps a start to one point instead of drawing; or the
            denoiser's noise is not that of cells.
    """
    process_of(denoiser).require_likelihood("a start at a cell count")
    if not sampler.rule.stochastic:
        raise ValueError(
            f"{sampler.rule} solves the probability flow, which has one end for one start; drawing a population given "
            "its cells needs the reverse SDE: Ancestral() or EulerMaruyama()"
        )
    key_start, key_steps = jax.random.split(key)
    start = top_up(key_start, v_hat, noise, sigma)
    levels = sampler.levels(condition, 0.0, sigma)
    return sample(key_steps, denoiser, condition, start, levels, sampler.rule)


class Particles(NamedTuple):
    """Weighted draws of a population given an observation."""

    v: Array  # (N, D)
    log_weights: Array  # (N,) normalised
    ess: Array  # (T + 1,) effective sample size at each level, before resampling
    log_evidence: Array  # () estimate of log p(y); its exponential is unbiased

    def resample(self, key: Array, num_draws: int) -> Array:
        """Equally weighted draws (num_draws, D)."""
        return self.v[_systematic(key, self.log_weights, num_draws)]


def twisted_smc(
    key: Array,
    denoiser: Denoiser,
    condition: Condition,
    observation: Observation,
    num_particles: int,
    sampler: Sampler = ancestral_sampler,
) -> Particles:
    """Draws given an observation, by sequential Monte Carlo down the levels of `sampler` to 0.

    At each level the observation is predicted by the twist `N(y; H D(v_t), R_t)`, `R_t = H S t / (S + t) H^T + R`.
    The next point is proposed from the ancestral transition times the linearised twist

        N(y; H (D(v_t) + S / (S + s) (v_s - mean_s)), R_s)

    which is Gaussian; its normaliser is the twist at t (law of total variance), so that the weight of a step is
    the twist at s over its linearisation. At s = 0 they are equal.

    Raises:
        ValueError: if the denoiser's process is not the Gaussian one.
    """
    process_of(denoiser).require_likelihood("conditioning")
    levels = sampler.levels(condition, 0.0)
    y, matrix, noise = observation
    values, vectors = condition.values, condition.vectors
    load = matrix @ vectors

    def twist_noise(sigma: Array) -> Array:
        return _predicted(load, jnp.square(posterior_sd(values, sigma))) + noise

    def move(
        key: Array, mean: Array, predicted: Array, variance: Array, sigma_next: Array
    ) -> tuple[Array, Array]:
        """Points (N, D) from the transition N(mean, variance) given y, and the linear prediction of y there (N, Q)."""
        key_point, key_noise = jax.random.split(key)
        slope = load * shrinkage(values, sigma_next)
        rest = twist_noise(sigma_next)
        # Matheron's rule: a joint draw of point and observation, moved by the gain to the observation that was made.
        x = root(variance) * jax.random.normal(key_point, mean.shape, mean.dtype)
        error = jax.random.normal(key_noise, (len(mean), len(y)), mean.dtype) @ jnp.linalg.cholesky(rest).T
        innovation = y - predicted - x @ slope.T - error
        gain = cho_solve(cho_factor(_predicted(slope, variance) + rest, lower=True), slope * variance)
        x = x + innovation @ gain
        return mean + x @ vectors.T, predicted + x @ slope.T

    def weigh(v: Array, linear: Array, sigma: Array) -> tuple[Array, Array]:
        """Estimates (N, D) and log weights (N,) of a step that arrived at `v`."""
        estimate = jax.vmap(lambda point: denoiser(point, sigma, condition))(v)
        covariance = twist_noise(sigma)
        log_twist = jax.vmap(_log_normal, (0, None))
        weight = log_twist(y - estimate @ matrix.T, covariance) - log_twist(y - linear, covariance)
        return estimate, weight

    def body(state: tuple[Array, ...], inputs: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        v, estimate, log_weights, log_evidence = state
        key, sigma, sigma_next = inputs
        key_resample, key_move = jax.random.split(key)
        enough = jnp.exp(-logsumexp(2 * log_weights)) >= _RESAMPLE_BELOW * num_particles
        chosen = jnp.where(
            enough, jnp.arange(num_particles), _systematic(key_resample, log_weights, num_particles)
        )
        log_weights = jnp.where(enough, log_weights, -jnp.log(num_particles))
        v, estimate = v[chosen], estimate[chosen]
        step = jax.vmap(ancestral_transition, (0, None, None, 0, None))(
            v, sigma, sigma_next, estimate, condition
        )
        v, linear = move(key_move, step.mean, estimate @ matrix.T, step.variance[0], sigma_next)
        estimate, weight = weigh(v, linear, sigma_next)
        return _accumulate(v, estimate, log_weights + weight, log_evidence)

    key_start, key_steps = jax.random.split(key)
    start = jnp.broadcast_to(condition.mean, (num_particles, len(values)))
    top = levels[0]
    v, linear = move(key_start, start, start @ matrix.T, values + jnp.square(top), top)
    estimate, weight = weigh(v, linear, top)
    prior = _log_normal(y - matrix @ condition.mean, _predicted(load, values) + noise)
    state, first_ess = _accumulate(v, estimate, weight - jnp.log(num_particles), prior)
    keys = jax.random.split(key_steps, len(levels) - 1)
    (v, _, log_weights, log_evidence), ess = jax.lax.scan(body, state, (keys, levels[:-1], levels[1:]))
    return Particles(v, log_weights, jnp.append(first_ess, ess), log_evidence)


class LatentWeights(NamedTuple):
    """Weights of draws of a batch's latents."""

    log_weights: Array  # (L,) normalised
    ess: Array  # () effective sample size; L where network and program agree


def reweight_latents(
    key: Array,
    denoiser: Denoiser,
    conditions: Condition,
    observations: Observation,
    num_particles: int,
    sampler: Sampler = ancestral_sampler,
) -> LatentWeights:
    """Weigh L draws of a batch's latents, made from the program's posterior given K observed populations.

    The weight of a draw is the product over populations of the network's evidence over the program's; the former is
    the unbiased estimate of `twisted_smc`, so that weighted draws target the posterior under the network's law.

    Args:
        key: random key.
        denoiser: the law's denoiser.
        conditions: leading axes (L, K): what each draw says of each observed population.
        observations: leading axis (K,).
        num_particles: per draw and population.
        sampler: its levels.
    """

    def one(key: Array, condition: Condition, observation: Observation) -> Array:
        evidence = twisted_smc(key, denoiser, condition, observation, num_particles, sampler).log_evidence
        load = observation.matrix @ condition.vectors
        innovation = observation.value - observation.matrix @ condition.mean
        return evidence - _log_normal(innovation, _predicted(load, condition.values) + observation.noise)

    keys = jax.random.split(key, conditions.mean.shape[:2])
    ratios = jax.vmap(jax.vmap(one), (0, 0, None))(keys, conditions, observations).sum(1)
    log_weights = ratios - logsumexp(ratios)
    return LatentWeights(log_weights, jnp.exp(-logsumexp(2 * log_weights)))


def _predicted(load: Array, variances: Array) -> Array:
    """`load diag(variances) load^T` (Q, Q)."""
    return (load * variances) @ load.T


def _log_normal(error: Array, covariance: Array) -> Array:
    """Log density () of `error` (Q,) under N(0, covariance)."""
    chol = jnp.linalg.cholesky(covariance)
    white = jax.scipy.linalg.solve_triangular(chol, error, lower=True)
    return -0.5 * (white @ white + len(error) * _LOG_2PI) - jnp.log(jnp.diagonal(chol)).sum()


def _accumulate(
    v: Array, estimate: Array, log_weights: Array, log_evidence: Array
) -> tuple[tuple[Array, Array, Array, Array], Array]:
    """Normalise the weights into the evidence; also the effective sample size."""
    total = logsumexp(log_weights)
    log_weights = log_weights - total
    return (v, estimate, log_weights, log_evidence + total), jnp.exp(-logsumexp(2 * log_weights))


def _systematic(key: Array, log_weights: Array, num_draws: int) -> Array:
    """Indices (num_draws,) by systematic resampling: one uniform number, evenly spaced points of the cumulated weights."""
    points = (jnp.arange(num_draws) + jax.random.uniform(key, dtype=log_weights.dtype)) / num_draws
    cumulated = jnp.cumsum(jnp.exp(log_weights))
    return jnp.minimum(jnp.searchsorted(cumulated / cumulated[-1], points), len(log_weights) - 1)

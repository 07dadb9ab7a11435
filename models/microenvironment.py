"""The law of all populations of one batch, its microenvironment integrated out in closed form.

Generative process of one batch with microenvironment `u`, per feature `g` (mathematics: hidden-factor program):

    u ~ N(0, I_K)                              microenvironment, shared by all features and populations
    d_g ~ N(0, batch_scale_g^2)                what is left of the batch in the feature, shared by its populations
    x_cg ~ N(Gamma_g . u, baseline_scale_g^2)  deviation of the control mean of context c from alpha_cg
    control mean    = alpha_cg + x_cg
    perturbed mean  = alpha_cg + x_cg + effect_jg
                      + s_j (slope_g x_cg + d_g + Lambda_jg . u) + N(0, (s_j response_scale_g)^2)
    observed mean   = mean + N(0, noise variance / n)

`s_j >= 0` is the strength of the condition: a null perturbation (`s = 0`) transmits nothing of the batch; and
`Lambda_j` is a loading of all responses plus what is particular to the condition. Given the globals everything is
linear and Gaussian. Per feature, eliminating `x_c` leaves a quadratic form in `(1, d, u)`, eliminating `d` one in
`(1, u)`, and summing these over features a K x K system for `u`. Cost: O(populations x features x K^2).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.scipy.linalg import cho_solve, solve_triangular
from numpyro.distributions import constraints

from hilbertcell.models.dose_curves import DoseCurve

_LOG_2PI = 1.8378770664093453
_SMALL = "batch sums"  # without the axis of slots


class Globals(NamedTuple):
    """Unknowns shared by all batches, in standardised feature units; C contexts, E conditions, D features."""

    alpha: Array  # (C, D) mean of the controls
    effect: Array  # (E, D) mean response of each condition (context, perturbation, dose)
    effect_scale: Array  # (D,) prior scale of the effects, for conditions never seen
    strength: Array  # (E,) how much of the batch a condition transmits, >= 0
    slope: Array  # (D,) change of the response per unit of own-baseline deviation
    baseline_loading: Array  # (D, K) Gamma
    response_loading: Array  # (D, K) Lambda, common to all conditions
    baseline_scale: Array  # (C, D) sd of a control mean around alpha + Gamma u
    response_scale: Array  # (C, D) sd of a response of unit strength around its mean
    batch_scale: Array  # (D,) sd of d
    modulation: Array | None = None  # (K, E, D) what a condition adds to Lambda; None: nothing
    modulation_scale: Array | None = None  # (K, D) its prior sd, for (perturbation, dose) never seen

    def shared_response(self, condition: Array, u: Array) -> Array:
        """Responses (J, D) of conditions (J,) to the microenvironment u (K,), for unit strength: Lambda_j . u."""
        common = self.response_loading @ u
        if self.modulation is None:
            return jnp.broadcast_to(common, (*condition.shape, *common.shape))
        return common + jnp.einsum("k,kjd->jd", u, self.modulation[:, condition])


class Observations(NamedTuple):
    """Observed population means of batches; slots `0..C-1` are the controls, one per context.

    Leading axes are free (a whole table has `(B,)`, one batch none). Unused slots have `observed` False and
    finite filler in `mean`, `noise`.
    """

    mean: Array  # (..., C + J, D) standardised embedding means
    noise: Array  # (..., C + J, D) variance of the mean's sampling noise, C_j / n_j
    observed: Array  # (..., C + J) bool
    condition: Array  # (..., J) int, index into `Globals.effect`
    context: Array  # (..., J) int, index into `Globals.alpha`


class _Form(NamedTuple):
    """Quadratic form of one batch after eliminating `x` (and what is needed to draw `x` back)."""

    precision: Array  # (C, D) of x given d, u
    b_one: Array  # (C, D) x = (b_one + b_d d + b_u . u) / precision
    b_d: Array  # (C, D)
    b_u: Array  # (C, D, K)
    n_one_d: Array  # (D,) entries of the form before d is eliminated
    n_d_u: Array  # (D, K)
    gain: Array  # (D,) posterior variance of d given u
    u_mean: Array  # (K,)
    u_chol: Array  # (K, K) lower Cholesky factor of the posterior precision of u
    log_density: Array  # ()


def _eliminate(globals_: Globals, batch: Observations) -> _Form:
    """Integrate out `x`, `d` and `u` of one batch.

    What has slots and features has the precision of `batch.noise`, all else that of the globals.
    """
    full, dtype = globals_.alpha.dtype, batch.noise.dtype
    num_contexts = globals_.alpha.shape[0]
    in_context = jax.nn.one_hot(batch.context, num_contexts, axis=0, dtype=dtype)

    def per_context(values: Array) -> Array:
        return (in_context @ values).astype(full)  # a product: scattered sums are slow

    def total(values: Array) -> Array:
        return values.sum(0).astype(full).sum()  # features in full precision: they are thousands

    observed = batch.observed[:, None]
    control_mask, mask = observed[:num_contexts].astype(full), observed[num_contexts:].astype(dtype)
    strength = globals_.strength[batch.condition][:, None].astype(dtype)
    mean = globals_.effect[batch.condition].astype(dtype) + globals_.alpha.astype(dtype)[batch.context]
    residual = batch.mean[num_contexts:].astype(dtype) - mean
    own = 1.0 + strength * globals_.slope.astype(dtype)
    spread = strength * globals_.response_scale.astype(dtype)[batch.context]
    variance = spread**2 + batch.noise[num_contexts:]
    weight = mask / variance
    deviation = batch.mean[:num_contexts] - globals_.alpha
    control_weight = control_mask / batch.noise[:num_contexts]
    prior = globals_.baseline_scale**-2

    known = control_weight + _kept(per_context(weight * own**2))
    precision = prior + known
    b_one = control_weight * deviation + per_context(weight * own * residual)
    b_d = -_kept(per_context(weight * own * strength))
    n_one_d = -(per_context(weight * residual * strength) + b_one * b_d / precision).sum(0)
    n_d = (_kept(per_context(weight * strength**2)) - b_d**2 / precision).sum(0)
    # u acts through d + Lambda.u and the mean Gamma.u of x, the same for all slots
    gamma, lam = globals_.baseline_loading, globals_.response_loading
    n_one_x = -(b_one * prior / precision).sum(0)
    n_d_x = -(b_d * prior / precision).sum(0)
    n_x = (prior * known / precision).sum(0)
    b_u = prior[..., None] * gamma + b_d[..., None] * lam
    n_one_u = n_one_d[:, None] * lam + n_one_x[:, None] * gamma
    n_d_u = n_d[:, None] * lam + n_d_x[:, None] * gamma
    cross = jnp.einsum("d,dk,dl->kl", n_d_x, lam, gamma)
    n_u = (
        jnp.einsum("d,dk,dl->kl", n_d, lam, lam)
        + jnp.einsum("d,dk,dl->kl", n_x, gamma, gamma)
        + cross
        + cross.T
    )
    if globals_.modulation is not None:  # and through what is particular to the condition of a slot
        own_load = strength * globals_.modulation[:, batch.condition].astype(dtype)
        loaded = weight * own_load  # (K, J, D): features last, or it is slow
        b_own = -jnp.einsum("cj,kjd->cdk", in_context, own * loaded).astype(full)
        share = b_own / precision[..., None]
        own_d = (strength * loaded).sum(1).T.astype(full) - (b_d[..., None] * share).sum(0)
        own_x = -(prior[..., None] * share).sum(0)
        b_u = b_u + b_own
        n_one_u = n_one_u - (residual * loaded).sum(1).T.astype(full) - (b_one[..., None] * share).sum(0)
        n_d_u = n_d_u + own_d
        cross = own_d.T @ lam + own_x.T @ gamma
        n_u = n_u + cross + cross.T + jnp.einsum("kjd,ljd->kl", loaded, own_load).astype(full)
        n_u = n_u - jnp.einsum("cdk,cdl->kl", share, b_own)

    # d has prior precision batch_scale^-2; its Schur complement, written so that scale 0 is legal.
    gain = globals_.batch_scale**2 / (1.0 + n_d * globals_.batch_scale**2)
    u_precision = jnp.eye(gamma.shape[1], dtype=gamma.dtype) + n_u
    u_precision = u_precision - jnp.einsum("d,dk,dl->kl", gain, n_d_u, n_d_u)
    u_chol = jnp.linalg.cholesky(u_precision)
    linear = -(n_one_u - (gain * n_one_d)[:, None] * n_d_u).sum(0)
    u_mean = cho_solve((u_chol, True), linear)
    # The quadratic form at its minimum over (x, d / batch_scale, u): nothing large is subtracted, and as the form is
    # flat there, no gradient passes through where it is.
    u = _fixed(u_mean)
    d_unit = _fixed(-globals_.batch_scale * (n_one_d + n_d_u @ u) / (1.0 + n_d * globals_.batch_scale**2))
    d = globals_.batch_scale * d_unit
    x = _fixed((b_one + b_d * d + b_u @ u) / precision)
    misfit = residual - own * x.astype(dtype)[batch.context] - strength * (d + lam @ u).astype(dtype)
    if globals_.modulation is not None:
        misfit = misfit - jnp.einsum("k,kjd->jd", u.astype(dtype), own_load)
    square = (prior * (x - gamma @ u) ** 2 + control_weight * (deviation - x) ** 2).sum()
    square = square + (d_unit**2).sum() + u @ u + total(weight * misfit**2)
    log_determinant = (
        jnp.log(precision / prior).sum()
        + jnp.log1p(n_d * globals_.batch_scale**2).sum()
        + 2.0 * jnp.log(jnp.diagonal(u_chol)).sum()
        + total(mask * (jnp.log(variance) + _LOG_2PI))
        + (control_mask * (jnp.log(batch.noise[:num_contexts]) + _LOG_2PI)).sum()
    )
    return _Form(
        precision, b_one, b_d, b_u, n_one_d, n_d_u, gain, u_mean, u_chol, -0.5 * (square + log_determinant)
    )


def _kept(small: Array) -> Array:
    """What gradients are computed from anew in `PopulationMeans.log_prob`, but for this."""
    return checkpoint_name(small, _SMALL)


def _fixed(small: Array) -> Array:
    return _kept(jax.lax.stop_gradient(small))


def log_density(globals_: Globals, batch: Observations) -> Array:
    """Collapsed log density of the observed means of one batch, a scalar."""
    return _eliminate(globals_, batch).log_density


def extend_modulation(
    key: Array, globals_: Globals, level: np.ndarray, first: np.ndarray, curve: DoseCurve
) -> Array | None:
    """Modulations (K, E', D) of conditions of levels (E',), some of them unknown to `globals_` (`None`: no modulation).

    `first` (L,) is a condition of each known level; a level never seen is drawn given `curve`.
    """
    if globals_.modulation is None or globals_.modulation_scale is None:
        return None
    known = jnp.swapaxes(globals_.modulation[:, first], 0, 1)  # (L, K, D)
    white = jax.random.normal(key, (len(curve.weights), *known.shape[1:]), known.dtype)
    return jnp.swapaxes(curve.extend(known, globals_.modulation_scale * white), 0, 1)[:, level]


class Latents(NamedTuple):
    """Latents of one batch, standardised feature units."""

    microenvironment: Array  # (K,) u
    batch_effect: Array  # (D,) d
    control_mean: Array  # (C, D) alpha + x


def draw_latents(key: Array, globals_: Globals, batch: Observations) -> Latents:
    """One exact draw of the latents of a batch given the globals and whatever was observed of it."""
    form = _eliminate(globals_, batch)
    key_u, key_d, key_x = jax.random.split(key, 3)
    dtype = globals_.alpha.dtype
    noise = jax.random.normal(key_u, form.u_mean.shape, dtype)
    u = form.u_mean + solve_triangular(form.u_chol.T, noise, lower=False)
    d = -form.gain * (form.n_one_d + form.n_d_u @ u)
    d = d + jnp.sqrt(form.gain) * jax.random.normal(key_d, d.shape, dtype)
    x = (form.b_one + form.b_d * d + form.b_u @ u) / form.precision
    x = x + jax.random.normal(key_x, x.shape, dtype) / jnp.sqrt(form.precision)
    return Latents(u, d, globals_.alpha + x)


def response_mean(globals_: Globals, latents: Latents, condition: Array, context: Array) -> Array:
    """Means (T, D) of the latent perturbed means of conditions (T,), given the latents of their batch."""
    strength = globals_.strength[condition][:, None]
    own = globals_.slope * (latents.control_mean[context] - globals_.alpha[context])
    shared = latents.batch_effect + globals_.shared_response(condition, latents.microenvironment)
    return latents.control_mean[context] + globals_.effect[condition] + strength * (own + shared)


def draw_response(
    key: Array,
    globals_: Globals,
    latents: Latents,
    condition: Array,
    context: Array,
    seen: Observations | None,
) -> Array:
    """Draw latent perturbed means (T, D) of target conditions given the latents of their batch.

    Args:
        key: random key.
        globals_: one draw of the globals.
        latents: one draw of the batch's latents.
        condition: (T,) index of each target's condition.
        context: (T,) index of each target's context.
        seen: observations of the targets themselves, `mean`, `noise` (T, D) and `observed` (T,), or None: then
            every target is unseen. A target that was seen is drawn given its own cells too.
    """
    mean = response_mean(globals_, latents, condition, context)
    strength = globals_.strength[condition][:, None]
    variance = (strength * globals_.response_scale[context]) ** 2
    if seen is not None:
        gain = seen.observed[:, None] * variance / (variance + seen.noise)
        mean = mean + gain * (seen.mean - mean)
        variance = variance * (1.0 - gain)
    return mean + jnp.sqrt(variance) * jax.random.normal(key, mean.shape, mean.dtype)


class PopulationMeans(dist.Distribution):
    """The law of a batch's observed population means, latents integrated out; event (C + J, D), batch (B,)."""

    support = constraints.real_matrix
    pytree_data_fields = ("globals_", "layout")

    def __init__(self, globals_: Globals, layout: Observations) -> None:
        """Law under `globals_` of the slots of `layout` (its noise, masks, indices; its means are not used)."""
        self.globals_, self.layout = globals_, layout
        super().__init__(layout.mean.shape[:-2], layout.mean.shape[-2:])

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw observed means, cell noise included; slots that are not observed are drawn too."""
        blind = self.layout._replace(observed=jnp.zeros_like(self.layout.observed))

        def one(key: Array, batch: Observations) -> Array:
            key_latent, key_response, key_noise = jax.random.split(key, 3)
            latents = draw_latents(key_latent, self.globals_, batch)
            response = draw_response(
                key_response, self.globals_, latents, batch.condition, batch.context, None
            )
            means = jnp.concatenate([latents.control_mean, response])
            return means + jnp.sqrt(batch.noise) * jax.random.normal(key_noise, means.shape, means.dtype)

        keys = jax.random.split(key, (*sample_shape, *self.batch_shape))
        draw = one
        for _ in self.batch_shape:
            draw = jax.vmap(draw)
        for _ in sample_shape:
            draw = jax.vmap(draw, in_axes=(0, None))
        return draw(keys, blind)

    def log_prob(self, value: Array) -> Array:
        """Collapsed log density per batch, (B,)."""
        dtype = self.layout.noise.dtype
        globals_ = self.globals_._replace(effect=self.globals_.effect.astype(dtype))  # once for all batches
        density = partial(log_density, globals_)
        keep = jax.checkpoint_policies.save_only_these_names(_SMALL)
        for _ in self.batch_shape:  # batch by batch, forgetting what gradients need: it stays in the cache
            density = partial(jax.lax.map, jax.checkpoint(density, policy=keep))
        return density(self.layout._replace(mean=value.astype(dtype)))

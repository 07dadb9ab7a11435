"""Is a posterior the posterior? Simulation-based calibration, joint coverage, interval coverage.

Unknowns and data are drawn from the program, the posterior of the data is drawn from, and the truth is ranked among
the draws: ranks are uniform if and only if the draws have the right law, averaged over data (Talts et al. 2018). Data
dependent quantities (predictions, the likelihood) are ranked as well, without which a posterior that ignores the data
would pass (Modrak et al. 2023). Uniformity is tested by the largest departure of the empirical distribution function
(Sailynoja et al. 2022), its law under uniform ranks simulated; Holm's correction over quantities.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from scipy.stats import binom

from hilbertcell.inference.guides import BlockGuide
from hilbertcell.inference.nuts import sample_chain
from hilbertcell.inference.starting_values import starting_values
from hilbertcell.inference.svi import Objective, svi_params
from hilbertcell.models.effects import Conditions, similarity_kernels
from hilbertcell.models.hidden_factors import hidden_factor_program
from hilbertcell.models.microenvironment import (
    Globals,
    Observations,
    PopulationMeans,
    draw_latents,
    draw_response,
)

# Simulations of uniform ranks behind a p-value: smallest p 1/20,001, enough for Holm over dozens of quantities.
_NULL_DRAWS = 20_000

Sites = dict[str, Array]
# (key, arguments of the program, starting values, starting sds) to sites of draws (S, ...); pure, is vmapped.
Posterior = Callable[[Array, tuple[Any, ...], Sites, Sites], Sites]


class Experiment(NamedTuple):
    """What a simulated data set looks like: arguments of the program without means, and a batch to predict for."""

    layout: Observations  # (B, ...)
    kernels: Array
    strength_level: np.ndarray
    feature_block: np.ndarray
    num_factors: int
    new_batch: Observations  # one batch whose controls are known and whose responses are asked for

    def args(self, means: Array | None) -> tuple[Any, ...]:
        """Arguments of `hidden_factor_program`."""
        return self.layout, self.kernels, self.strength_level, self.feature_block, self.num_factors, means


def small_experiment(num_batches: int = 8, num_features: int = 3, num_factors: int = 1) -> Experiment:
    """Two contexts, two perturbations of which one context saw one only, populations of 20, 50 or 200 cells.

    Everything the program can switch on is there: factors, contexts, strengths, interaction. Call it where float64
    is enabled.
    """
    context, components = np.array([0, 0, 1]), np.array([[1.0, 0], [0, 1], [1, 0]])
    kernels = similarity_kernels(Conditions(context, components, np.full(3, np.nan), None))
    n = np.random.default_rng(0).choice([20, 50, 200], size=(num_batches + 1, 5))
    noise = np.repeat(1.0 / n[..., None], num_features, -1)
    table = Observations(
        np.zeros_like(noise), noise, np.ones(n.shape, bool),
        np.tile(np.arange(3), (num_batches + 1, 1)), np.tile(context, (num_batches + 1, 1)),
    )  # fmt: skip
    table = jax.tree.map(jnp.asarray, table)
    return Experiment(
        jax.tree.map(lambda leaf: leaf[:-1], table), jnp.asarray(np.stack(list(kernels.values()))),
        np.array([0, 1, 0]), np.zeros(num_features, int), num_factors, jax.tree.map(lambda leaf: leaf[-1], table),
    )  # fmt: skip


class Calibration(NamedTuple):
    """Truth and draws of every quantity; N simulations, S draws, arrays float64."""

    truth: dict[str, np.ndarray]  # (N, ...)
    draws: dict[str, np.ndarray]  # (N, S, ...)
    notes: dict[
        str, np.ndarray
    ]  # (N, S, ...) what the posterior returned beside sites: names with an underscore


def simulate_globals(experiment: Experiment, sites: Sites) -> Globals:
    """Globals that values of the program's sites amount to."""
    seeded = handlers.seed(hidden_factor_program, 0)
    return handlers.substitute(seeded, data=sites)(*experiment.args(None))


def simulate(key: Array, experiment: Experiment) -> tuple[Sites, Array, Array]:
    """One draw of the program: sites, observed means (B, C + J, D), control means (C, D) seen of the new batch."""
    key_program, key_new = jax.random.split(key)
    trace = handlers.trace(handlers.seed(hidden_factor_program, key_program)).get_trace(
        *experiment.args(None)
    )
    sites = {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}
    means = sites.pop("response")
    new = jax.tree.map(lambda leaf: leaf[None], experiment.new_batch)
    controls = PopulationMeans(simulate_globals(experiment, sites), new).sample(key_new)[0]
    return sites, means, controls[: sites["alpha"].shape[-1]]


def quantities(key: Array, experiment: Experiment, sites: Sites, means: Array, controls: Array) -> Sites:
    """What is compared: invariants, predictions and scalars under one value of the sites, given the data.

    Latents are drawn exactly from their law given the sites and the data. Under the true sites that, too, is a
    draw from the joint law of unknowns and data: truth and posterior draws go through the same lines.
    """
    globals_ = simulate_globals(experiment, sites)
    key_first, key_new, key_response = jax.random.split(key, 3)
    layout = experiment.layout._replace(mean=means)
    first = draw_latents(key_first, globals_, jax.tree.map(lambda leaf: leaf[0], layout))
    gamma_u = globals_.baseline_loading @ first.microenvironment
    num_contexts = globals_.alpha.shape[0]
    new = experiment.new_batch
    observed = jnp.arange(len(new.observed)) < num_contexts
    new = new._replace(
        mean=jnp.zeros_like(new.mean).at[:num_contexts].set(controls), observed=new.observed & observed
    )
    latents = draw_latents(key_new, globals_, new)
    prediction = draw_response(key_response, globals_, latents, new.condition, new.context, None)
    likelihood = PopulationMeans(globals_, layout).log_prob(means).sum()
    return {
        "Gamma u": gamma_u,
        "B Gamma u + Lambda u": globals_.slope * gamma_u + globals_.response_loading @ first.microenvironment,
        "prediction": prediction,
        "effect": globals_.effect,
        "slope": globals_.slope,
        "log scale": sites["log_scale_mean"],
        "batch ratio": sites["batch_ratio"],
        "amplitude": sites["effect_amplitude"],
        "log likelihood": likelihood,
    }


def calibrate(key: Array, experiment: Experiment, posterior: Posterior, num_simulations: int) -> Calibration:
    """Simulate data sets and draw from `posterior` of each, all at once; call it where float64 is enabled."""
    key_simulate, key_truth, key_posterior, key_draws = jax.random.split(key, 4)
    split = lambda key: jax.random.split(key, num_simulations)
    sites, means, controls = jax.jit(jax.vmap(lambda k: simulate(k, experiment)))(split(key_simulate))
    starts = [starting_values(experiment.args(data), 0) for data in np.asarray(means)]
    initial, initial_sd = (
        {name: np.stack([s[i][name] for s in starts]) for name in starts[0][i]} for i in (0, 1)
    )

    def one(key: Array, key_draws: Array, means: Array, controls: Array, initial: Sites, sd: Sites) -> tuple:
        drawn = posterior(key, experiment.args(means), initial, sd)
        notes = {name: drawn.pop(name) for name in list(drawn) if name.startswith("_")}
        keys = jax.random.split(key_draws, len(drawn["slope"]))
        compare = jax.vmap(lambda k, s: quantities(k, experiment, s, means, controls))
        return compare(keys, drawn), notes

    truth = jax.jit(jax.vmap(lambda k, s, m, c: quantities(k, experiment, s, m, c)))(
        split(key_truth), sites, means, controls
    )
    draws, notes = jax.jit(jax.vmap(one))(
        split(key_posterior), split(key_draws), means, controls, initial, initial_sd
    )
    return Calibration(*jax.tree.map(np.asarray, (truth, draws, notes)))


def ranks(truth: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """How many of the draws (N, S) lie below the truth (N,): (N,) int in 0..S."""
    return (draws < truth[:, None]).sum(1)


def tarp_ranks(truth: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ranks by distance to a random point: joint coverage of all Q quantities (TARP, Lemos et al. 2023).

    Args:
        truth: (N, Q); quantities are brought to one unit by their spread over simulations.
        draws: (N, S, Q).
        rng: chooses as the reference of each simulation the truth of another one.

    Returns:
        (N,) int in 0..S, how many draws are nearer to the reference than the truth is.
    """
    low, high = np.quantile(truth, [0.25, 0.75], axis=0)  # a program's prior may have no variance
    unit = high - low
    # A cycle through a random order: everyone gets somebody else.
    order = rng.permutation(len(truth))
    reference = np.empty_like(truth)
    reference[order] = truth[np.roll(order, 1)]
    distance = np.abs((draws - reference[:, None]) / unit).sum(-1)
    return (distance < np.abs((truth - reference) / unit).sum(-1)[:, None]).sum(1)


def uniformity_p(found: np.ndarray, num_draws: int, rng: np.random.Generator) -> float:
    """P-value of uniform ranks 0..num_draws, from the least likely point of their distribution function.

    At every cut the number of smaller ranks is binomial; the statistic is the smallest two-sided tail probability
    over cuts, its law under uniformity simulated (Sailynoja et al. 2022, section 2.3). Level exact up to that.

    Args:
        found: (N,) int.
        num_draws: S, the largest rank.
        rng: simulates the null law.
    """
    num = len(found)
    cuts = np.arange(1, num_draws + 1)
    below = np.arange(num + 1)[:, None]
    level = cuts / (num_draws + 1)
    tail = 2 * np.minimum(binom.cdf(below, num, level), binom.sf(below - 1, num, level))  # (N + 1, S)

    def statistic(counts: np.ndarray) -> np.ndarray:
        return tail[counts.cumsum(-1)[..., :-1], np.arange(num_draws)].min(-1)

    null = statistic(rng.multinomial(num, np.full(num_draws + 1, 1 / (num_draws + 1)), size=_NULL_DRAWS))
    mine = statistic(np.bincount(found, minlength=num_draws + 1))
    return float((1 + (null <= mine).sum()) / (1 + _NULL_DRAWS))


def holm(p: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values: rejecting those below alpha errs once or more with probability at most alpha."""
    adjusted, largest = {}, 0.0
    for i, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p) - i) * value))
        adjusted[name] = largest
    return adjusted


def calibration_p(
    truth: dict[str, np.ndarray], draws: dict[str, np.ndarray], rng: np.random.Generator
) -> dict[str, float]:
    """Holm-adjusted p-values of uniform ranks: the first entry of every quantity, and all entries of all jointly."""
    num, num_draws = next(iter(draws.values())).shape[:2]
    p = {}
    for name, value in truth.items():
        first, drawn = value.reshape(num, -1)[:, 0], draws[name].reshape(num, num_draws, -1)[..., 0]
        p[name] = uniformity_p(ranks(first, drawn), num_draws, rng)
    names = [name for name in truth if name != "log likelihood"]
    together = np.concatenate([truth[name].reshape(num, -1) for name in names], axis=1)
    drawn = np.concatenate([draws[name].reshape(num, num_draws, -1) for name in names], axis=2)
    p["joint (TARP)"] = uniformity_p(tarp_ranks(together, drawn, rng), num_draws, rng)
    return holm(p)


def shrunk(draws: dict[str, np.ndarray], factor: float = 0.8) -> dict[str, np.ndarray]:
    """A sampler that is wrong on purpose: draws (N, S, ...) pulled towards their means by `factor`."""
    means = {name: values.mean(1, keepdims=True) for name, values in draws.items()}
    return {name: means[name] + factor * (values - means[name]) for name, values in draws.items()}


def coverage(truth: np.ndarray, draws: np.ndarray, level: float = 0.9) -> np.ndarray:
    """Share (N,) of the entries of each simulation that central intervals of draws (N, S, ...) cover."""
    # The quantiles that cover as often as their level when draws are few.
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=1, method="weibull")
    return ((low <= truth) & (truth <= high)).reshape(len(truth), -1).mean(1)


def nuts_posterior(num_warmup: int, num_draws: int, thinning: int, max_tree_depth: int = 6) -> Posterior:
    """One chain of NUTS; trees are cut short, because all simulations wait for the deepest one."""

    def posterior(key: Array, args: tuple[Any, ...], initial: Sites, initial_sd: Sites) -> Sites:
        chain = sample_chain(
            key, args, initial, num_warmup=num_warmup, num_draws=num_draws, thinning=thinning,
            max_tree_depth=max_tree_depth,
        )  # fmt: skip
        return chain.sites | {"_diverging": chain.diverging, "_num_steps": chain.num_steps}

    return posterior


def svi_posterior(
    num_draws: int,
    num_steps: int,
    learning_rate: float,
    num_particles: int = 1,
    objective: Objective = "elbo",
) -> Posterior:
    """Draws of the guide that `fit_svi` would find."""

    def posterior(key: Array, args: tuple[Any, ...], initial: Sites, initial_sd: Sites) -> Sites:
        guide = BlockGuide(hidden_factor_program, *args, initial=initial, initial_sd=initial_sd)
        key_fit, key_draws = jax.random.split(key)
        params = svi_params(
            key_fit, hidden_factor_program, guide, args, num_steps=num_steps, learning_rate=learning_rate,
            num_particles=num_particles, objective=objective,
        )  # fmt: skip
        return jax.vmap(lambda k: guide.sample(k, params))(jax.random.split(key_draws, num_draws))

    return posterior

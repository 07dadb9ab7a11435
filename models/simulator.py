"""A world with known microenvironments: the generative program behind `hilbertcell simulate` and the statistical tests.

Three steps, each a function of the one before: `world` draws what all batches share, `environments` draws what one
batch has to itself, `populations` puts both together into the log rates of every population; `cells` then emits
counts. On the log-rate scale, with u the microenvironment, d what is left of the batch, and s = 0 for an inert
perturbation,

    control(c, b)  = alpha_c + Gamma_c u_b + eps
    shift(c, t, b) = h_t(dose) s_t [a_t + inter_ct + B_t (control(c, b) - alpha_c) + Lambda_t u_b + d_b + eps']
    fraction       = logistic(logit_c + v' u_b)          share of cells that respond ("mixed responders"), else 1

and a combination adds its members' effects, modulations and a synergy of its own. Cells of a population are
gamma-Poisson around these rates, with library sizes, overdispersion and a low-rank cell state.

The default numbers of `SimulatorSettings` were fixed before any model was fitted to what they generate; do not tune
them towards a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import seed as seeded

CONTROL = "control"
MODES = (-0.95, 0.95)  # of the first coordinate of a bimodal microenvironment, whose variance stays 1


def _compiled(*static: int) -> Callable:
    """`jax.jit` with the optimiser off: what runs once spends its time in the compiler, three times faster so."""
    return partial(jax.jit, static_argnums=static, compiler_options={"xla_backend_optimization_level": 0})


@dataclass(frozen=True)
class SimulatorSettings:
    """What kind of world is drawn. Scales are standard deviations of natural-log rates unless said otherwise.

    The law over populations is Gaussian on the log-rate scale when `mixed_responders` and `bimodal_environment` are
    both off (`gaussian_law`). With `controls_blind` the controls carry no trace of the microenvironment, which then acts on responses
    only. Raises ValueError for an inert perturbation or a combination that names a perturbation that is not listed.
    """

    contexts: tuple[str, ...] = ("lymphoid", "myeloid", "stromal")
    perturbations: tuple[str, ...] = ("A", "B", "inert")
    inert: tuple[str, ...] = ("inert",)
    combinations: tuple[tuple[str, str], ...] = (("A", "B"),)
    doses: tuple[float, ...] = ()  # none: every perturbation acts in full
    num_batches: int = 8
    num_genes: int = 300
    num_factors: int = 2
    num_features: int = 4

    mixed_responders: bool = True
    bimodal_environment: bool = False
    controls_blind: bool = False

    baseline_scale: float = 1.5
    context_scale: float = 0.5
    loading_scale: float = 0.25
    control_residual_scale: float = 0.08
    program_fraction: float = 0.2  # share of genes that one perturbation programme touches
    effect_scale: float = 1.0
    feature_share: float = 0.7  # share of the variance of the effects that the perturbation features explain
    interaction_scale: float = 0.25
    synergy_scale: float = 0.5
    slope_mean: float = -0.3  # saturation: what is already high rises less
    slope_scale: float = 0.15
    modulation_scale: float = 0.12
    batch_effect_scale: float = 0.06
    response_residual_scale: float = 0.08
    responder_logit: float = 1.0  # mean over contexts, before the microenvironment
    responder_loading_scale: float = 0.5

    cells_per_population: float = 100.0  # median over batches
    batch_size_scale: float = 0.4
    library_size: float = 1000.0  # median counts of a cell
    library_scale: float = 0.35
    depth_scale: float = 0.2  # of library sizes between batches
    library_response_scale: float = 0.15
    dispersion: float = 0.3  # median over genes; variance of a count = mean + dispersion mean^2
    num_states: int = 2
    state_scale: float = 0.2

    def __post_init__(self) -> None:
        """Refuse names that stand for nothing."""
        named = set(self.inert).union(*self.combinations)
        if unknown := sorted(named - set(self.perturbations)):
            raise ValueError(
                f"inert or combinations name {', '.join(unknown)}, but perturbations are "
                f"{', '.join(self.perturbations)}: add them there"
            )

    @property
    def gaussian_law(self) -> bool:
        """Whether log rates are Gaussian over batches: every cell responds, and the microenvironment has one mode."""
        return not (self.mixed_responders or self.bimodal_environment)

    @property
    def labels(self) -> tuple[str, ...]:
        """Every perturbation label, control first, combinations ("A+B") last: the axis T of `World`."""
        return (CONTROL, *self.perturbations, *("+".join(pair) for pair in self.combinations))

    @property
    def batches(self) -> tuple[str, ...]:
        """Names of the batches, in the order in which names sort."""
        width = len(str(self.num_batches))
        return tuple(f"donor-{i + 1:0{width}d}" for i in range(self.num_batches))


class World(NamedTuple):
    """What all batches share: C contexts, T labels (control first), K factors, G genes; natural-log rates."""

    baseline: jax.Array  # (C, G) alpha
    loading: jax.Array  # (C, K, G) Gamma_c
    features: jax.Array  # (perturbations, F), known to a user
    effect: jax.Array  # (T, G) a
    synergy: jax.Array  # (T, G) part of `effect` that the members of a combination do not explain
    interaction: jax.Array  # (C, T, G)
    slope: jax.Array  # (T, G) B
    modulation: jax.Array  # (T, K, G) Lambda
    activity: jax.Array  # (T,) s: 0 for control and inert perturbations, else 1
    half_dose: jax.Array  # (T,) dose of half the full effect
    responder_logit: jax.Array  # (C,)
    responder_loading: jax.Array  # (K,)
    library_response: jax.Array  # (T,) log ratio of library sizes, responding to control cells
    dispersion: jax.Array  # (G,)
    state: jax.Array  # (num_states, G) loadings of the cell state


class Environments(NamedTuple):
    """What B batches have to themselves."""

    microenvironment: jax.Array  # (B, K) u, mean 0 and variance 1 per coordinate
    batch_effect: jax.Array  # (B, G) d
    control_residual: jax.Array  # (B, C, G) eps
    response_residual: jax.Array  # (B, C, T, G) eps'
    depth: jax.Array  # (B,) log library size relative to the median


class Rates(NamedTuple):
    """The law of the cells of P populations; natural-log rates up to a constant per cell."""

    control: jax.Array  # (P, G)
    shift: jax.Array  # (P, G) of a responding cell
    fraction: jax.Array  # (P,) of cells that respond
    log_library: jax.Array  # (P,) of a cell that does not respond
    library_response: jax.Array  # (P,) added to log_library of a responding cell


def _design(settings: SimulatorSettings) -> jax.Array:
    """Members of each label: (T, perturbations) of 0 and 1; the control has none."""
    index = {name: i for i, name in enumerate(settings.perturbations)}
    design = np.zeros((len(settings.labels), len(index)), np.float32)
    for row, label in enumerate(settings.labels[1:], start=1):
        design[row, [index[part] for part in label.split("+")]] = 1.0
    return jnp.asarray(design)


def world(settings: SimulatorSettings) -> World:
    """NumPyro program of what all batches share. Scales: `SimulatorSettings`; shapes: `World`."""
    s, sample = settings, numpyro.sample

    def normal(name: str, scale: float, *shape: int) -> jax.Array:
        return sample(name, dist.Normal(0.0, scale).expand(shape).to_event(len(shape)))

    C, T, K, G = len(s.contexts), len(s.labels), s.num_factors, s.num_genes
    M, F = len(s.perturbations), s.num_features
    active = np.array([name not in s.inert for name in s.perturbations], np.float32)
    design = _design(s) * active
    activity = (design.sum(1) > 0).astype(jnp.float32)

    gene_baseline = normal("gene_baseline", s.baseline_scale, G)
    baseline = gene_baseline + normal("context_baseline", s.context_scale, C, G)
    loading = normal("shared_loading", s.loading_scale, K, G)
    loading = loading + normal("context_loading", 0.3 * s.loading_scale, C, K, G)
    if s.controls_blind:
        loading = jnp.zeros_like(loading)

    # A programme touches few genes, so that most genes of a perturbation stay where they are.
    features = normal("features", 1.0, M, F)
    touched = sample("programme_genes", dist.Bernoulli(s.program_fraction).expand((F, G)).to_event(2))
    chosen = sample("specific_genes", dist.Bernoulli(s.program_fraction).expand((M, G)).to_event(2))
    programmes = normal("programmes", s.effect_scale / np.sqrt(F), F, G) * touched
    specific = normal("specific_effect", s.effect_scale, M, G) * chosen
    single = np.sqrt(s.feature_share) * features @ programmes + np.sqrt(1 - s.feature_share) * specific
    combined = (design.sum(1) > 1).astype(jnp.float32)[:, None]
    reach = jnp.abs(design @ single) > 0  # synergy acts where a member acts
    synergy = normal("synergy", s.synergy_scale, T, G) * combined * reach

    modulation = normal("modulation", s.modulation_scale, M, K, G)
    slope = s.slope_mean + normal("slope", s.slope_scale, T, G)
    return World(
        baseline=baseline,
        loading=loading,
        features=features,
        effect=design @ single + synergy,
        synergy=synergy,
        interaction=normal("interaction", s.interaction_scale, C, T, G) * reach * activity[:, None],
        slope=slope * activity[:, None],
        modulation=jnp.einsum("tm,mkg->tkg", design, modulation),
        activity=activity,
        half_dose=sample("half_dose", dist.LogNormal(0.0, 0.5).expand((T,)).to_event(1)),
        responder_logit=s.responder_logit + normal("responder_logit", 0.3, C),
        responder_loading=normal("responder_loading", s.responder_loading_scale, K),
        library_response=normal("library_response", s.library_response_scale, T) * activity,
        dispersion=sample("dispersion", dist.LogNormal(np.log(s.dispersion), 0.3).expand((G,)).to_event(1)),
        state=normal("state", s.state_scale, s.num_states, G),
    )


def environments(settings: SimulatorSettings, num_batches: int) -> Environments:
    """NumPyro program of what batches have to themselves, drawn for `num_batches` new ones."""
    s = settings
    C, T, K, G = len(s.contexts), len(s.labels), s.num_factors, s.num_genes
    law = dist.Normal(jnp.zeros(K), 1.0).to_event(1)
    if s.bimodal_environment:
        modes = jnp.zeros((2, K)).at[:, 0].set(jnp.array(MODES))
        width = jnp.ones((2, K)).at[:, 0].set(np.sqrt(1 - MODES[1] ** 2))
        law = dist.MixtureSameFamily(
            dist.Categorical(jnp.full(2, 0.5)), dist.Normal(modes, width).to_event(1)
        )
    with numpyro.plate("batch", num_batches):
        u = numpyro.sample("microenvironment", law)
        d = numpyro.sample("batch_effect", dist.Normal(0.0, s.batch_effect_scale).expand((G,)).to_event(1))
        eps = dist.Normal(0.0, s.control_residual_scale).expand((C, G)).to_event(2)
        eps_response = dist.Normal(0.0, s.response_residual_scale).expand((C, T, G)).to_event(3)
        return Environments(
            microenvironment=u,
            batch_effect=d,
            control_residual=numpyro.sample("control_residual", eps),
            response_residual=numpyro.sample("response_residual", eps_response),
            depth=numpyro.sample("depth", dist.Normal(0.0, s.depth_scale)),
        )


@_compiled(0)
def populations(
    settings: SimulatorSettings,
    world: World,
    environments: Environments,
    context: np.ndarray,
    perturbation: np.ndarray,
    batch: np.ndarray,
    dose: np.ndarray | None = None,
) -> Rates:
    """Log rates of P populations given by codes (P,) into contexts, labels (0 = control) and batches.

    `dose` (P,) acts through a Hill curve dose / (dose + half dose); without it every perturbation acts in full.
    """
    c, t, b, w, e = context, perturbation, batch, world, environments
    u = e.microenvironment[b]
    deviation = jnp.einsum("pk,pkg->pg", u, w.loading[c]) + e.control_residual[b, c]
    shift = (
        w.effect[t]
        + w.interaction[c, t]
        + w.slope[t] * deviation
        + jnp.einsum("pk,pkg->pg", u, w.modulation[t])
        + e.batch_effect[b]
        + e.response_residual[b, c, t]
    )
    strength = w.activity[t]
    if dose is not None:
        strength = strength * dose / (dose + w.half_dose[t])
    fraction = jnp.ones(len(t))
    if settings.mixed_responders:
        fraction = jax.nn.sigmoid(w.responder_logit[c] + u @ w.responder_loading)
    return Rates(
        control=w.baseline[c] + deviation,
        shift=strength[:, None] * shift,
        fraction=jnp.where(w.activity[t] > 0, fraction, 0.0),
        log_library=np.log(settings.library_size) + e.depth[b],
        library_response=strength * w.library_response[t],
    )


@_compiled(1)
def draw_world(key: jax.Array, settings: SimulatorSettings) -> World:
    """One world."""
    return seeded(world, key)(settings)


@_compiled(1, 2)
def draw_environments(key: jax.Array, settings: SimulatorSettings, num_batches: int) -> Environments:
    """Environments of `num_batches` new batches, independent and identically distributed."""
    return seeded(environments, key)(settings, num_batches)


def generator(key: jax.Array) -> np.random.Generator:
    """NumPy's generator from a JAX key.

    Counts are drawn by NumPy: its gamma and Poisson samplers are some twenty times faster on a CPU than JAX's.
    """
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def cells(
    rng: np.random.Generator,
    settings: SimulatorSettings,
    world: World,
    rates: Rates,
    population: int,
    num_cells: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts (num_cells, G) of cells of one population of `rates`, and which of them respond (num_cells,)."""
    responds = rng.random(num_cells) < float(rates.fraction[population])
    state = rng.standard_normal((num_cells, settings.num_states)).astype(np.float32)
    logits = state @ np.asarray(world.state) + np.asarray(rates.control[population])
    logits[responds] += np.asarray(rates.shift[population])
    rate = np.exp(logits - logits.max(axis=1, keepdims=True))
    library = rng.normal(float(rates.log_library[population]), settings.library_scale, num_cells)
    library += responds * float(rates.library_response[population])
    rate *= (np.exp(library) / rate.sum(axis=1)).astype(np.float32)[:, None]
    dispersion = np.asarray(world.dispersion)
    rate *= dispersion * rng.standard_gamma(1 / dispersion, rate.shape, dtype=np.float32)
    return rng.poisson(rate), responds


def population_means(
    rng: np.random.Generator, settings: SimulatorSettings, world: World, rates: Rates, num_cells: int = 1000
) -> np.ndarray:
    """True means (P, G) of log1p(1e4 count / library size), by Monte Carlo over `num_cells` cells per population.

    The error of each is the within-population standard deviation / sqrt(num_cells).
    """
    means = np.empty(rates.control.shape, np.float32)
    for p in range(len(means)):
        counts, _ = cells(rng, settings, world, rates, p, num_cells)
        library = np.maximum(counts.sum(axis=1, keepdims=True), 1)
        means[p] = np.log1p(counts * (1e4 / library)).mean(axis=0)
    return means


def draw_population_means(
    key: jax.Array,
    settings: SimulatorSettings,
    world: World,
    context: str,
    perturbation: str,
    num_draws: int,
    u: np.ndarray | None = None,
    num_cells: int = 1000,
) -> np.ndarray:
    """Draws (num_draws, G) from the true law of the population mean in a new batch, log1p CP10k.

    With `u` (K,) the microenvironment is held there, else it is drawn. The same key gives the same new batches
    whatever the perturbation: calls for `control` and for a perturbation are draws of both jointly.
    """
    for_batches, for_cells = jax.random.split(key)
    new = draw_environments(for_batches, settings, num_draws)
    if u is not None:
        new = new._replace(microenvironment=jnp.broadcast_to(jnp.asarray(u), new.microenvironment.shape))
    codes = settings.contexts.index(context), settings.labels.index(perturbation)
    c, t = (np.full(num_draws, code) for code in codes)
    b = np.arange(num_draws)
    rates = populations(settings, world, new, c, t, b)
    return population_means(generator(for_cells), settings, world, rates, num_cells)

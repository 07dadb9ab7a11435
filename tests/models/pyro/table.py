"""The table of laws: programs with a twin x cases that they have to agree on. A new program is one line of PROGRAMS."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hilbertcell.models.effects import Conditions, similarity_kernels
from hilbertcell.models.hidden_factors import hidden_factor_program
from hilbertcell.models.microenvironment import Globals, Observations
from hilbertcell.models.response_program import response_program


class Case(NamedTuple):
    """A screen as the programs see it; a condition is (context, indices of its perturbations, dose)."""

    conditions: tuple[tuple[int, tuple[int, ...], float | None], ...]
    num_batches: int = 4
    num_genes: int = 3
    num_random_features: int = 0
    num_factors: int = 2
    cells: tuple[int, int] = (20, 200)  # fewest, most
    hidden: tuple[tuple[int, int], ...] = ()  # (batch, slot) without an observation
    perturbation_features: bool = False

    def hidden_factor_arguments(self) -> tuple[Any, ...]:
        """Arguments of the hidden-factor program, means among them; call it where float64 is enabled."""
        rng = np.random.default_rng(len(self.conditions))
        context = np.array([c for c, _, _ in self.conditions])
        singles = 1 + max(max(members) for _, members, _ in self.conditions)
        components = np.array(
            [[float(i in members) for i in range(singles)] for _, members, _ in self.conditions]
        )
        dose = np.array([np.nan if d is None else d for _, _, d in self.conditions])
        features = rng.standard_normal((len(context), 2)) if self.perturbation_features else None
        kernels = similarity_kernels(Conditions(context, components, dose, features))
        levels = [(members, d) for _, members, d in self.conditions]
        known = list(dict.fromkeys(levels))
        num_contexts, num_features = int(context.max()) + 1, self.num_genes + self.num_random_features
        shape = (self.num_batches, num_contexts + len(context), num_features)
        n = rng.integers(*self.cells, endpoint=True, size=shape[:2])
        observed = np.ones(shape[:2], bool)
        for place in self.hidden:
            observed[place] = False
        # No two batches hold the conditions in the same order: a slot taken for a condition would show.
        order = np.stack([rng.permutation(len(context)) for _ in range(self.num_batches)])
        layout = Observations(
            rng.standard_normal(shape), rng.uniform(0.5, 2.0, shape) / n[..., None], observed, order, context[order]
        )  # fmt: skip
        block = (np.arange(num_features) >= self.num_genes).astype(int)
        level = np.array([known.index(one) for one in levels])
        layout = jax.tree.map(jnp.asarray, layout)
        stacked = jnp.asarray(np.stack(list(kernels.values())))
        return layout, stacked, level, block, self.num_factors, layout.mean


def _crossed(num_contexts: int, num_perturbations: int) -> tuple[tuple[int, tuple[int, ...], None], ...]:
    return tuple((c, (p,), None) for c in range(num_contexts) for p in range(num_perturbations))


CASES = {
    "two contexts": Case(_crossed(2, 2)),
    "one batch": Case(_crossed(2, 2), num_batches=1),
    "one context": Case(_crossed(1, 3)),
    "one condition of one feature": Case(_crossed(1, 1), num_genes=1, num_factors=1),
    "controls and populations missing": Case(
        _crossed(2, 2), hidden=((0, 0), (0, 1), (1, 3), (2, 1), (2, 2), (2, 5), *((3, j) for j in range(6)))
    ),
    "random features": Case(_crossed(2, 2), num_random_features=2),
    "combinations": Case(tuple((c, m, None) for c in (0, 1) for m in ((0,), (1,), (0, 1)))),
    "doses and perturbation features": Case(
        tuple((c, (p,), d) for c in (0, 1) for p in (0, 1) for d in (0.1, 1.0)), perturbation_features=True
    ),
    "few cells": Case(_crossed(1, 2), cells=(1, 3)),
    "a million cells": Case(_crossed(1, 2), cells=(10**6, 10**6)),
    "no factors": Case(_crossed(2, 2), num_factors=0),
    "too many perturbations to modulate": Case(_crossed(1, 33), num_genes=2, num_batches=2),
}


def _response_arguments(case: Case) -> tuple[Any, ...]:
    """Arguments of the response program: globals of any value, in the shapes of the case."""
    layout, _, level, block, num_factors, means = case.hidden_factor_arguments()
    rng = np.random.default_rng(1)
    positive = lambda *shape: np.exp(0.4 * rng.standard_normal(shape))
    num_conditions, num_features = len(level), len(block)
    contexts, loaded = means.shape[1] - num_conditions, (num_features, num_factors)
    modulated = num_factors > 0 and level.max() > 0
    globals_ = Globals(
        alpha=rng.standard_normal((contexts, num_features)),
        effect=rng.standard_normal((num_conditions, num_features)),
        effect_scale=positive(num_features),
        strength=positive(int(level.max()) + 1)[level],
        slope=0.3 * rng.standard_normal(num_features),
        baseline_loading=rng.standard_normal(loaded),
        response_loading=rng.standard_normal(loaded),
        baseline_scale=positive(contexts, num_features),
        response_scale=positive(contexts, num_features),
        batch_scale=positive(num_features),
        modulation=rng.standard_normal((num_factors, num_conditions, num_features)) if modulated else None,
        modulation_scale=positive(num_factors, num_features) if modulated else None,
    )
    return jax.tree.map(jnp.asarray, globals_), layout, means


class Program(NamedTuple):
    """One program in both languages; the twin by the name of its function in `models/pyro`: torch may be absent."""

    numpyro: Callable
    twin: str
    arguments: Callable[[Case], tuple[Any, ...]]  # of the NumPyro program; the observed means last
    slow: frozenset[str] = frozenset()  # cases for `make test-slow`: those that XLA takes seconds to compile

    def pyro(self) -> Callable:
        """The program in Pyro."""
        module, function = self.twin.split(".")
        return getattr(import_module(f"hilbertcell.models.pyro.{module}"), function)


PROGRAMS = {
    "hidden factors": Program(
        hidden_factor_program,
        "hidden_factors.hidden_factor_program",
        Case.hidden_factor_arguments,
        frozenset(CASES) - {"controls and populations missing", "random features", "no factors"},
    ),
    "response": Program(response_program, "response_program.response_program", _response_arguments),
}

"""One fit in NumPyro and in Pyro: ELBO, predictions and time, on `bodenmiller_bcrxl_cytof`.

`python -m hilbertcell.analyses.twin_benchmark` (`make bench-twin`; it needs the extra torch) fits five donors in both
libraries with four seeds each, predicts the sixth from its controls, and writes `docs/_parts/twin.md`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from hilbertcell.analyses.first_benchmarks import bodenmiller, data_folder, markdown
from hilbertcell.data.populations import Populations
from hilbertcell.inference import fit as numpyro_fit
from hilbertcell.inference.fit import Fit
from hilbertcell.inference.settings import Settings
from hilbertcell.models.hidden_factors import hidden_factor_program

HIDDEN = "patient6"  # any of the six
LIBRARIES = ("NumPyro", "Pyro")
_ELBO_DRAWS = 400
_ELBO_SEED = 10_000  # none that a fit was made with: its own noise flatters it
_DRAWS = 500
_SEEDS = tuple(range(4))


class Start(NamedTuple):
    """Everything of a fit but its inference, and the donor to predict."""

    fit: Fit
    unseen: Populations


def start(folder: Path, num_steps: int) -> Start:
    """Embed five donors; what is inferred at it, in the fewest steps, is thrown away."""
    populations, _ = bodenmiller(folder)
    unseen = (populations.labels["batch"] == HIDDEN).to_numpy()
    quick, settings = Settings(num_steps=10), Settings(num_steps=num_steps)
    fit = numpyro_fit.fit(populations.select(~unseen), settings=quick)
    fit = replace(fit, settings=settings, params={}, losses=np.zeros(0))
    return Start(fit, populations.select(unseen))


def infer(library: str, begun: Fit, seed: int) -> tuple[Fit, float]:
    """The fit by one library, and the seconds that took, compilation included."""
    run: Callable[[Fit], Fit] = numpyro_fit.infer
    if library == "Pyro":
        from hilbertcell.inference.pyro.fit import infer as run
    before = time.perf_counter()
    fitted = run(replace(begun, seed=seed))
    return fitted, time.perf_counter() - before


def elbo(library: str, fit: Fit, num_draws: int = _ELBO_DRAWS) -> tuple[float, float]:
    """ELBO of the parameters of a fit as one library evaluates it, and its Monte Carlo standard error."""
    if library == "Pyro":
        values = _elbo_in_pyro(fit, num_draws)
    else:
        from numpyro.infer import Trace_ELBO

        with jax.enable_x64(True):
            guide, params, args = fit.guide(), jax.tree.map(jax.numpy.asarray, fit.params), fit.program_args
            one = lambda key: -Trace_ELBO().loss(key, params, hidden_factor_program, guide, *args)
            keys = jax.random.split(jax.random.key(_ELBO_SEED), num_draws)
            values = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(num_draws))


def _elbo_in_pyro(fit: Fit, num_draws: int) -> np.ndarray:
    import pyro
    import torch
    from pyro.infer import Trace_ELBO

    from hilbertcell.inference.pyro.fit import block_guide, program_args
    from hilbertcell.inference.pyro.svi import load_params
    from hilbertcell.models.pyro import hidden_factors

    args, guide, loss = program_args(fit), block_guide(fit), Trace_ELBO().loss
    with pyro.get_param_store().scope(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(_ELBO_SEED)
        load_params(fit.params, "cpu")
        return np.array([-loss(hidden_factors.hidden_factor_program, guide, *args) for _ in range(num_draws)])


class Predicted(NamedTuple):
    """Means of the unseen donor: mean and sd over draws, flat over (population, marker)."""

    mean: np.ndarray
    sd: np.ndarray

    def against(self, other: "Predicted") -> tuple[float, float]:
        """Root mean square of differences of means in units of the other's sd, and the mean log ratio of sds."""
        distance = np.sqrt((((self.mean - other.mean) / other.sd) ** 2).mean())
        return float(distance), float(np.log(self.sd / other.sd).mean())


def predict(fit: Fit, unseen: Populations, num_draws: int = _DRAWS) -> Predicted:
    """Predict the unseen donor from its controls."""
    draws = fit.predict(unseen, num_samples=num_draws)["predictions"]["mean"].to_numpy()[0]
    return Predicted(draws.mean(0).ravel(), draws.std(0).ravel())


def compare(begun: Start, seeds: tuple[int, ...]) -> tuple[list[dict[str, Any]], list[Predicted]]:
    """A row per library and seed, and what that fit predicts; rows are compared with the first one."""
    rows: list[dict[str, Any]] = []
    every: list[Predicted] = []
    for library in LIBRARIES:
        for seed in seeds:
            fitted, seconds = infer(library, begun.fit, seed)
            of_each = [elbo(name, fitted) for name in LIBRARIES]
            every.append(predict(fitted, begun.unseen))
            distance, log_ratio = every[-1].against(every[0])
            rows.append(
                {
                    "fit by": library,
                    "seed": seed,
                    "seconds": seconds,
                    **{f"ELBO in {n}": value for n, value in zip(LIBRARIES, of_each, strict=True)},
                    "means, in sds": distance,
                    "sds, ratio": float(np.exp(log_ratio)),
                }
            )
    return rows, every


def conclusion(rows: list[dict[str, Any]], every: list[Predicted]) -> str:
    """Differences between the libraries beside those between the seeds of one."""
    of = np.array([row["fit by"] for row in rows])
    values = np.array([row[f"ELBO in {LIBRARIES[0]}"][0] for row in rows])
    groups = [values[of == library] for library in LIBRARIES]
    difference = groups[1].mean() - groups[0].mean()
    error = np.sqrt(sum(group.var(ddof=1) / len(group) for group in groups))
    pairs = list(combinations(range(len(rows)), 2))
    distance = np.array([every[j].against(every[i])[0] for i, j in pairs])
    same = np.array([of[i] == of[j] for i, j in pairs])
    return (
        f"ELBO of Pyro's fits less NumPyro's: {difference:.1f} ± {error:.1f} (standard error over seeds). Predicted means "
        f"of two fits differ by {distance[same].mean():.3f} sds within a library, by {distance[~same].mean():.3f} between "
        "the two (mean over pairs of fits).\n"
    )


def main() -> None:
    """Run the benchmark; print the part of docs/benchmarks.md and write it."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.twin_benchmark", description=__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="steps of variational inference")
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the parts")
    options = parser.parse_args()
    import hilbertcell.models.pyro  # noqa: F401 - says what to install before anything is computed

    load = os.getloadavg()[0]
    rows, every = compare(start(data_folder(), options.steps), _SEEDS)
    shown = [
        {
            name: "{:.1f} ± {:.1f}".format(*value) if isinstance(value, tuple)
            else f"{value:.3g}" if isinstance(value, float) else value
            for name, value in row.items()
        }
        for row in rows
    ]  # fmt: skip
    text = markdown(pd.DataFrame(shown).set_index("fit by")).replace("| model |", "| fit by |", 1)
    text = (
        f"{options.steps:,} steps, {_ELBO_DRAWS} draws of an ELBO, {_DRAWS} of the predictions; load {load:.1f} on "
        f"{os.cpu_count()} cores before.\n\n{text}\n{conclusion(rows, every)}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "twin.md").write_text(text)
    (options.out / "twin.json").write_text(json.dumps(rows, indent=1))
    print(text)


if __name__ == "__main__":
    main()

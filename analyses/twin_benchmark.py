"""One fit in NumPyro and in Pyro: ELBO, predictions and time, on `bodenmiller_bcrxl_cytof`.

`python -m hilbertcell.analyses.twin_benchmark` (`make bench-twin`; it needs the extra torch) fits five donors in both
libraries with two seeds each, predicts the sixth from its controls, and writes `docs/_parts/twin.md`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
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


def compare(begun: Start, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row per library and seed; predictions are compared with those of the first row."""
    rows, reference = [], None
    for library in LIBRARIES:
        for seed in seeds:
            fitted, seconds = infer(library, begun.fit, seed)
            of_each = [elbo(name, fitted) for name in LIBRARIES]
            predicted = predict(fitted, begun.unseen)
            reference = reference or predicted
            distance, log_ratio = predicted.against(reference)
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
    return rows


def main() -> None:
    """Run the benchmark; print the part of docs/benchmarks.md and write it."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.twin_benchmark", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps of variational inference")
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the parts")
    options = parser.parse_args()
    import hilbertcell.models.pyro  # noqa: F401 - says what to install before anything is computed

    load = os.getloadavg()[0]
    rows = compare(start(data_folder(), options.steps), seeds=(0, 1))
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
        f"{os.cpu_count()} cores before.\n\n{text}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "twin.md").write_text(text)
    (options.out / "twin.json").write_text(json.dumps(rows, indent=1))
    print(text)


if __name__ == "__main__":
    main()

"""Are the posteriors right? `python -m hilbertcell.analyses.calibration_benchmark` writes docs/_parts/calibration.md.

Data sets are simulated from the program; NUTS, a sampler that is wrong on purpose and variational inference are ranked
and measured on the same ones.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
import pandas as pd
from numpyro.diagnostics import effective_sample_size

from hilbertcell.analyses.first_benchmarks import markdown
from hilbertcell.inference.calibration import (
    Calibration,
    calibrate,
    calibration_p,
    coverage,
    nuts_posterior,
    shrunk,
    small_experiment,
    svi_posterior,
)

# Warm-up, draws kept, steps per draw, depth of trees: draws near enough to independent.
NUTS = (200, 30, 10, 5)
SVI_DRAWS, SVI_STEPS, SVI_RATE = (
    200,
    6000,
    0.05,
)  # steps and rate are those of a fit to tables as small as these


def uniformity(nuts: Calibration, variational: Calibration) -> pd.DataFrame:
    """Holm-adjusted p-values of uniform ranks by quantity, one row a sampler."""
    rows = {
        "NUTS": nuts.draws,
        "NUTS, draws shrunk by 0.8 (wrong on purpose)": shrunk(nuts.draws),
        "SVI": variational.draws,
    }
    found = {name: calibration_p(nuts.truth, draws, np.random.default_rng(0)) for name, draws in rows.items()}
    return pd.DataFrame(found).T[[*nuts.truth, "joint (TARP)"]].map(lambda p: f"{p:.4f}")


def comparison(nuts: Calibration, variational: Calibration) -> pd.DataFrame:
    """Coverage of 90 % intervals and how SVI departs from NUTS on the same data, one row a kind of quantity.

    Distances between posterior means are in posterior sds; what the finite number of draws of NUTS adds to them is
    taken off their root mean square.
    """
    rows = {}
    for name, truth in nuts.truth.items():
        reference, draws = (x.draws[name].reshape(*x.draws[name].shape[:2], -1) for x in (nuts, variational))
        sd = reference.std(1, ddof=1)
        distance = (draws.mean(1) - reference.mean(1)) / sd
        number = np.mean([effective_sample_size(one[None]).mean() for one in reference])
        excess = (distance**2).mean() - 1.0 / min(number, reference.shape[1])
        cover = {key: coverage(truth, x.draws[name]) for key, x in (("NUTS", nuts), ("SVI", variational))}
        rows[name] = {
            f"cover, {key}": f"{c.mean():.3f} +- {c.std() / len(c) ** 0.5:.3f}" for key, c in cover.items()
        } | {
            "sd ratio SVI / NUTS": f"{np.exp(np.log(draws.std(1) / sd).mean()):.2f}",
            "median distance of means": f"{np.median(np.abs(distance)):.2f}",
            "root mean square": f"{np.sqrt(max(excess, 0.0)):.2f}",
        }
    return pd.DataFrame(rows).T


def main() -> None:
    """Run the benchmark; print the part of docs/benchmarks.md and write it, figures as JSON beside it."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.calibration_benchmark", description=__doc__)
    parser.add_argument("--simulations", type=int, default=300, help="simulated data sets")
    parser.add_argument("--svi-steps", type=int, default=SVI_STEPS, help="steps of variational inference")
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the parts")
    options = parser.parse_args()
    with jax.enable_x64(True):
        experiment, key = small_experiment(), jax.random.key(0)
        nuts = calibrate(key, experiment, nuts_posterior(*NUTS), options.simulations)
        svi = svi_posterior(SVI_DRAWS, options.svi_steps, SVI_RATE)
        variational = calibrate(key, experiment, svi, options.simulations)
    batches, slots, features = experiment.layout.mean.shape
    p, compared = uniformity(nuts, variational), comparison(nuts, variational)
    text = (
        f"{options.simulations} data sets of {batches} batches x {slots} populations x {features} features; NUTS: "
        f"{NUTS[1]} draws, {nuts.notes['_diverging'].mean():.2%} of them after a divergence; SVI: {options.svi_steps} "
        "steps. P-values of uniform ranks (largest departure of the distribution function), Holm-adjusted over the "
        f"columns of a row:\n\n{markdown(p).replace('| model |', '| |', 1)}\n"
        f"The same data, all entries of a quantity:\n\n{markdown(compared).replace('| model |', '| |', 1)}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "calibration.md").write_text(text)
    figures = {"uniformity": p.to_dict("index"), "comparison": compared.to_dict("index")}
    (options.out / "calibration.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()

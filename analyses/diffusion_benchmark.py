"""Speed and accuracy of the trained diffusion on a law that is known: `python -m hilbertcell.analyses.diffusion_benchmark`.

2,000 populations of 20 to 1,000 cells in 64 coordinates; a population responds or does not, which the program's Gaussian
law cannot say. Measures the training, by how many of the leading coordinates the network sees, 500 draws of each of 100
populations, their spread, and what few denoiser evaluations lose. The same command runs on whatever device jax finds and adds
that device's row to `docs/_parts/diffusion.json`; a device that was not there is 'not run'. Seconds of the CPU are those of
the process (all cores together): other work on the machine does not count.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jax import Array

from hilbertcell.analyses.first_benchmarks import markdown
from hilbertcell.analyses.law_scores import energy_score
from hilbertcell.inference.denoiser_training import BLOCK, Recipe, TrainingData, run_block, train
from hilbertcell.inference.denoiser_training import init as init_training
from hilbertcell.inference.diffusion_law import LEADING
from hilbertcell.inference.samplers import Sampler, Split, asinh_grid, split_sampler, terminal, trajectory
from hilbertcell.inference.score_matching import Conditions, noisy_points
from hilbertcell.models.denoisers import (
    Condition,
    Denoiser,
    ResidualDenoiser,
    gaussian_denoiser,
    init_network,
)

COORDINATES, FEATURES = 64, 32
POPULATIONS, HELD_OUT, TARGETS, DRAWS = 2_000, 200, 100, 500
GAP = 1.2  # between the two modes, in units of the noise of one cell; five sd of one mode
WIDTH, DEPTH = 64, 2
SEEN = (4, 16, 64)  # coordinates of networks that are trained for comparison
EVALUATIONS = (8, 12, 16, 200)
# Of generated populations whose spread is compared with that of true ones.
CELLS = (16, 64, 256, 1_024, 4_096)
DEVICES = ("cpu", "gpu")
# Published limit of one H200, dense bf16 operations a second, against which a GPU's row is read.
BF16_FLOPS = 989e12


def variances() -> np.ndarray:
    """What the program leaves open in each coordinate, in units of the noise of one cell."""
    spectrum = np.geomspace(0.05, 0.002, COORDINATES)
    spectrum[0] += GAP**2 / 4
    return spectrum


def latent_means(rng: np.random.Generator, num: int) -> np.ndarray:
    """Means (num, D) of populations around their program means: the first coordinate has two modes."""
    spectrum = variances()
    spectrum[0] -= GAP**2 / 4
    v = np.sqrt(spectrum) * rng.standard_normal((num, COORDINATES))
    v[:, 0] += rng.choice([-0.5, 0.5], num) * GAP
    return v


def material(rng: np.random.Generator, num: int) -> tuple[TrainingData, np.ndarray]:
    """Populations as a training sees them, and their latent means (num, D)."""
    n = np.exp(rng.uniform(np.log(20), np.log(1000), num))
    latent = latent_means(rng, num)
    observed = latent + rng.standard_normal(latent.shape) / np.sqrt(n)[:, None]
    points = noisy_points(observed, np.broadcast_to(np.eye(COORDINATES), (num, COORDINATES, COORDINATES)), n)
    conditions = Conditions(
        np.zeros((1, num, COORDINATES)), np.eye(COORDINATES)[None, None], variances()[None, None],
        np.ones((1, num)), np.zeros(num), rng.standard_normal((1, num, FEATURES)),
    )  # fmt: skip
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (points, conditions))
    conditions = single[1]._replace(context=jnp.zeros(num, int))
    return TrainingData(single[0], conditions, jnp.zeros(FEATURES, bool)), latent


def measured(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """A result, seconds of the process and of the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.process_time() - cpu, time.perf_counter() - clock


@partial(jax.jit, static_argnames=("sampler", "num"))
def draw(key: Array, denoiser: Denoiser, conditions: Condition, sampler: Sampler, num: int) -> Array:
    """`num` draws (num, T, D) of each of T populations."""
    keys = jax.random.split(key, (num, conditions.mean.shape[0]))
    over = jax.vmap(lambda key, c: sampler(key, denoiser, c, 0.0))
    return jax.lax.map(lambda keys: over(keys, conditions), keys, batch_size=10)


def flops_of_an_evaluation() -> float:
    """Multiply-adds times two: rotations into and out of the eigenbasis, and the network."""
    rotations = 6 * COORDINATES**2
    network = LEADING * WIDTH * 2 + WIDTH * (17 + FEATURES) + WIDTH**2 * (1 + 4 * DEPTH)
    return 2.0 * (rotations + network)


class Result(NamedTuple):
    """A row of the speed table; scores by number of evaluations, losses by coordinates seen; what the figure needs."""

    row: dict[str, Any]
    scores: pd.DataFrame
    seen: pd.DataFrame
    denoiser: ResidualDenoiser
    condition: Condition


def run(recipe: Recipe) -> Result:
    """Train, draw and score."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    training, _ = material(rng, POPULATIONS)
    held_out, latent = material(rng, HELD_OUT)

    def new(seen: int) -> ResidualDenoiser:
        network = init_network(key, seen, FEATURES, width=WIDTH, depth=DEPTH)
        return ResidualDenoiser(network, jnp.min(training.points.level))

    denoiser = new(LEADING)
    compiling = measured(lambda: run_block(key, init_training(denoiser, recipe), training, held_out, recipe))
    trained, cpu, clock = measured(lambda: train(key, denoiser, training, held_out, recipe))
    conditions = jax.vmap(lambda j: held_out.conditions.at(jnp.asarray(0), j))(jnp.arange(TARGETS))
    shot = partial(draw, key, trained.denoiser, conditions, split_sampler, DRAWS)
    first, again = measured(shot), measured(shot)
    evaluations = DRAWS * TARGETS * split_sampler.num_steps
    rate = evaluations * flops_of_an_evaluation() / again[2]
    row = {
        "training, s": cpu,
        "training, s by the clock": clock,
        "steps": BLOCK * len(trained.course),
        "compiling the training, s": compiling[1] - cpu / len(trained.course),
        "drawing, s": again[1],
        "drawing, s by the clock": again[2],
        "compiling the drawing, s": first[1] - again[1],
        "draws per second": DRAWS * TARGETS / again[2],
        "GFLOP/s": rate / 1e9,
    }
    if jax.default_backend() == "gpu":
        row["share of bf16"] = rate / BF16_FLOPS
    laws = {"program": draw(key, gaussian_denoiser_tree(), conditions, split_sampler, DRAWS)}
    for number in EVALUATIONS:
        sampler = Sampler(Split(), number, asinh_grid)
        laws[f"{number} evaluations"] = draw(key, trained.denoiser, conditions, sampler, DRAWS)
    laws["truth"] = np.stack([latent_means(rng, TARGETS) for _ in range(DRAWS)])
    table = pd.DataFrame({name: _scores(np.asarray(law, np.float64), latent) for name, law in laws.items()}).T
    table.insert(1, "x 200 evaluations", table["energy score"] / table.loc["200 evaluations", "energy score"])
    courses = {LEADING: trained.course}
    courses |= {
        seen: train(jax.random.fold_in(key, seen), new(seen), training, held_out, recipe).course
        for seen in SEEN
    }
    seen = pd.DataFrame(
        {
            f"{number} of {COORDINATES}": {
                "best held-out loss less the program's": f"{course[:, 1].min():.3f}",
                "after steps": str(BLOCK * (1 + int(course[:, 1].argmin()))),
            }
            for number, course in sorted(courses.items())
        }
    ).T
    return Result(row, table, seen, trained.denoiser, jax.tree.map(lambda leaf: leaf[0], conditions))


def gaussian_denoiser_tree() -> Denoiser:
    """The program's denoiser as a tree of arrays, which jit can take."""
    return jax.tree_util.Partial(gaussian_denoiser)


def _scores(draws: np.ndarray, latent: np.ndarray) -> dict[str, float]:
    """Energy scores of latent means (mean over targets) from draws (S, T, D); draws between modes; spread over truth's.

    Spread: variance over populations of the mean of m cells, summed over coordinates; a cell has noise of variance one.
    """
    both = [
        np.mean([energy_score(draws[:, t, :number], latent[t, :number]) for t in range(TARGETS)])
        for number in (COORDINATES, 1)
    ]
    variance, true = draws.var((0, 1)).sum(), variances().sum()
    spread = {f"spread at {m}": (variance + COORDINATES / m) / (true + COORDINATES / m) for m in CELLS}
    between = (np.abs(draws[..., 0]) < GAP / 4).mean()
    names = ("energy score", "of coordinate 1", "between the modes")
    return dict(zip(names, (*both, between), strict=True)) | spread


def draw_figure(path: Path, denoiser: Denoiser, condition: Condition) -> None:
    """One population on its way from noise to a response, among 200 others, with what it is taken for on the way."""
    levels = split_sampler.levels(condition, 0.0)

    def walk(key: Array) -> tuple[Array, Array]:
        key_start, key_steps = jax.random.split(key)
        start = terminal(key_start, denoiser, condition, levels[0])
        _, (points, info) = trajectory(key_steps, denoiser, condition, start, levels, split_sampler.rule)
        return jnp.concatenate([start[None], points]), info.estimate

    paths, _ = jax.vmap(walk)(jax.random.split(jax.random.key(1), 200))
    levels, paths = np.asarray(levels), np.asarray(paths)
    sd = np.sqrt(np.asarray(condition.values) + levels[:, None] ** 2)
    whitened = (paths - np.asarray(condition.mean)) / sd  # coordinates are eigenvectors here
    clock = np.arange(len(levels))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(2, 1), layout="constrained")
    left.plot(clock, whitened[:, :, 0].T, color="0.8", linewidth=0.5)
    left.plot(clock, whitened[0, :, 0], color="tab:red", label="one population")
    ticks = clock[::4]
    left.set_xticks(ticks, [f"{levels[i]:.2g}" for i in ticks])
    left.set(xlabel="noise level sigma", ylabel="coordinate 1 in sd of the program")
    left.legend(frameon=False)
    right.hist(paths[:, -1, 0], 30, color="0.8", orientation="horizontal")
    right.axhline(paths[0, -1, 0], color="tab:red")
    right.set(xlabel="populations of 200", ylabel="coordinate 1 at sigma = 0")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def page(rows: dict[str, dict[str, Any] | str], result: Result) -> str:
    """The part of the docs: speed by device, scores by evaluations, losses by coordinates seen."""
    names = list(dict.fromkeys(name for row in rows.values() if isinstance(row, dict) for name in row))
    cells = {
        device: {name: f"{row[name]:,.4g}" if name in row else "" for name in names}
        if isinstance(row, dict)
        else dict.fromkeys(names, row)
        for device, row in rows.items()
    }
    speed = markdown(pd.DataFrame(cells).T).replace("| model |", "| device |", 1)
    scores = markdown(result.scores.map("{:.4f}".format)).replace("| model |", "| law |", 1)
    seen = markdown(result.seen).replace("| model |", "| coordinates seen |", 1)
    return f"{speed}\n{scores}\n{seen}"


def main() -> None:
    """Run on the device at hand; write the table and the figure."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.diffusion_benchmark", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the part")
    parser.add_argument("--figure", type=Path, default=Path("docs/images/diffusion.png"))
    parser.add_argument("--steps", type=int, default=Recipe().num_steps, help="steps of the training at most")
    options = parser.parse_args()
    result = run(Recipe(num_steps=options.steps))
    options.out.mkdir(parents=True, exist_ok=True)
    store = options.out / "diffusion.json"
    known = json.loads(store.read_text())["devices"] if store.exists() else {}
    rows = {device: known.get(device, "not run") for device in DEVICES} | {jax.default_backend(): result.row}
    store.write_text(json.dumps({"devices": rows, "scores": result.scores.to_dict()}, indent=1) + "\n")
    text = page(rows, result)
    (options.out / "diffusion.md").write_text(text)
    draw_figure(options.figure, result.denoiser, result.condition)
    print(text)


if __name__ == "__main__":
    main()

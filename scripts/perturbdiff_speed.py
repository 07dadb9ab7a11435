"""Speed and memory of PerturbDiff: `scripts/perturbdiff_speed.py training|sampling|quality|memory|utilisation|curve`.

`training` and `sampling` time this package against the same network in PyTorch, run eagerly (`perturbdiff_peer`), by CPU seconds of
this process, which other work on the machine does not change, and by the clock; both on the same weights, whose outputs are
compared first. `training` does so at the published PBMC configuration, `sampling` at a small one. `quality` is the energy distance
of cells that samplers make of a donor left out. `curve [bfloat16]` trains both from the same weights on the same sets of real cells,
with draws of their own. `memory` is what the compiled step of the published configuration asks for; `utilisation` needs a GPU.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hilbertcell.analyses.metrics import energy_distance
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.splits import make_split
from hilbertcell.inference.perturbdiff.cell_sets import CellSets, expression_of
from hilbertcell.inference.perturbdiff.fit import fit_perturbdiff, new_networks
from hilbertcell.inference.perturbdiff.generation import sample_sets
from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings
from hilbertcell.inference.perturbdiff.vocabulary import Vocabulary
from hilbertcell.models import perturbdiff
from hilbertcell.models.perturbdiff import training

LABELS, BRANCH = (4, 8, 6), 128


class Size(NamedTuple):
    """Sizes of a network and of a batch."""

    genes: int
    hidden: int
    depth: int
    heads: int
    sets: int
    set_size: int


SMALL = Size(590, 128, 4, 4, 4, 64)
PUBLISHED = Size(2000, 512, 8, 8, 8, 256)  # PBMC
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bf16 operations a second, dense


def networks(of: Size):
    """Networks whose every parameter is random, so that no part is silent."""

    def new(key):
        denoiser = perturbdiff.init_denoiser(
            key, of.genes, hidden=of.hidden, depth=of.depth, num_heads=of.heads, gene_features=0
        )
        encoder = perturbdiff.init_covariate_encoder(
            key, of.genes, perturbations=LABELS[0], cell_types=LABELS[1], batches=LABELS[2], hidden=BRANCH
        )
        return denoiser, encoder

    made = jax.jit(new)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(made))))
    return jax.tree.map(lambda a: a + 0.02 * jax.random.normal(next(keys), a.shape, a.dtype), made)


def cells(seed: int, of: Size) -> perturbdiff.Batch:
    """Sets of made-up cells in model units, labels shared by the cells of a set."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(0.3, 0.3, (2, of.sets, of.set_size, of.genes)).astype(np.float32)
    return perturbdiff.Batch(*x, *(rng.integers(0, k, (of.sets, 1), dtype=np.int32) for k in LABELS))


def seconds(function: Callable[[int], object], repeats: int, compiles: bool = True) -> tuple[float, float]:
    """CPU and clock seconds of one call; after a first one if that compiles."""
    if compiles:
        function(0)
    cpu, clock = time.process_time(), time.perf_counter()
    for i in range(repeats):
        function(i + 1)
    return (time.process_time() - cpu) / repeats, (time.perf_counter() - clock) / repeats


PUBLISHED_RULE = "published: 100 steps from index 99, guidance 1"
RULES = {  # sampler, start_time, sample_steps, guidance
    PUBLISHED_RULE: ("ddim", 100, 100, 1.0),
    "10 steps of ddim from index 99, guidance 1": ("ddim", 100, 10, 1.0),
    "10 steps of dpm from index 99, guidance 1": ("dpm", 100, 10, 1.0),
    "10 steps of dpm from index 99, no guidance": ("dpm", 100, 10, 0.0),
    "10 steps of dpm over all of the chain, no guidance": ("dpm", 1000, 10, 0.0),
}


def peer_of(pair, of: Size):
    """The PyTorch side with the same weights; raises SystemExit if the two do not agree."""
    import torch
    from perturbdiff_peer import Peer

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    peer = Peer(of.genes, of.hidden, of.depth, of.heads, LABELS, BRANCH)
    state = {n: torch.from_numpy(a.copy()) for n, a in perturbdiff.to_state_dict(*pair).items()}
    peer.load_state_dict(state)
    batch, t = cells(9, of._replace(sets=2, set_size=4)), np.array([3, 700])
    ours = pair[0](batch.x0, batch.control, batch.control, t, pair[1](*batch[2:5]))
    x, y, ids = torch_batch(torch, batch)
    with torch.no_grad():
        theirs = peer.estimate(x, y, y, torch.from_numpy(t), peer.cov_encoder(*ids))
    error = np.linalg.norm(np.asarray(ours) - theirs.numpy()) / np.linalg.norm(ours)
    if error > 1e-4:
        raise SystemExit(f"the two networks differ by {error:.1e}")
    return torch, peer


def torch_batch(torch, batch: perturbdiff.Batch):
    """Cells, controls, and the ids of every cell."""
    ids = tuple(torch.from_numpy(np.repeat(i, batch.x0.shape[1], 1).astype(np.int64)) for i in batch[2:5])
    return torch.from_numpy(batch.x0), torch.from_numpy(batch.control), ids


def measure_training(repeats: int = 3) -> None:
    """Cells a second of a training step at the published configuration: ours in both precisions, theirs in float32."""
    from perturbdiff_peer import Trainer

    pair = networks(PUBLISHED)
    torch, peer = peer_of(pair, PUBLISHED)
    trainer = Trainer(peer, 2e-4)
    batches = [cells(i, PUBLISHED) for i in range(2)]
    torch.manual_seed(0)
    prepared = [torch_batch(torch, batch) for batch in batches]
    theirs = seconds(lambda i: trainer.step(*prepared[i % 2]), repeats)
    for precision in ("float32", "bfloat16"):
        recipe = perturbdiff.Recipe(max_steps=1000, compute_dtype=precision)
        state = [training.init(pair, recipe)]

        def ours(i: int, state=state, recipe=recipe) -> None:
            batch = jax.tree.map(jnp.asarray, batches[i % 2])
            state[0], info = training.step(state[0], batch, jax.random.key(i), recipe)
            info.loss.block_until_ready()

        report(f"training, {precision}", PUBLISHED.sets * PUBLISHED.set_size, seconds(ours, repeats), theirs)


def measure_sampling() -> None:
    """Cells a second: ours by the rules of `RULES`, theirs as published (200 evaluations a cell)."""
    from perturbdiff_peer import sample

    pair = networks(SMALL)
    torch, peer = peer_of(pair, SMALL)
    batch, rng = cells(0, SMALL), np.random.default_rng(3)
    start = rng.standard_normal(batch.x0.shape, np.float32)
    _x, y, ids = torch_batch(torch, batch)
    theirs = seconds(lambda i: sample(peer, torch.from_numpy(start), y, ids), 1, compiles=False)
    covariates = pair[1](*batch[2:5])
    for name, (sampler, start_time, num_steps, guidance) in RULES.items():
        rule, weight = (sampler, start_time, num_steps), jnp.asarray(guidance) if guidance else None
        ours = seconds(
            lambda i, rule=rule, weight=weight: sample_sets(
                pair[0], start, batch.control, covariates, weight, rule, None, None
            ).block_until_ready(),
            3,
        )
        report(name, SMALL.sets * SMALL.set_size, ours, theirs)


def measure_quality(seeds: int = 5) -> None:
    """Energy distance to the cells of a donor left out of kang_ifnb_wide, means over populations, by sampling rule.

    One training at a small size with the published start, last weights; equal noise and partners for all rules of a seed.
    Ratios to the published rule are paired by seed.
    """
    populations = kang()
    labels, split = populations.labels, make_split(populations.labels, "unseen_batch", seed=0)
    settings = PerturbDiffSettings(
        hidden=64, depth=2, num_heads=2, covariate_hidden=32, gene_features=0, batch_covariate=False,
        set_size=32, cells_per_batch=256, max_steps=800, learning_rate=1e-3,
    )  # fmt: skip
    fitted = fit_perturbdiff(populations, holdout=split, seed=0, settings=settings)
    fitted = replace(fitted, networks=fitted.current)
    targets = labels.loc[list(split.held_out)]
    truth = [
        np.concatenate([rows for _, rows in populations.select(labels.index == name).chunks()])
        for name in targets.index
    ]
    controls = populations.select(labels["is_control"].to_numpy())
    number = np.minimum([len(x) for x in truth], 256)
    found = {}
    for name, (sampler, start_time, num_steps, guidance) in RULES.items():
        rule = {"sampler": sampler, "start_time": start_time, "sample_steps": num_steps, "guidance": guidance}
        found[name] = np.array(
            [
                np.mean(
                    [
                        energy_distance(x, y)
                        for x, y in zip(
                            fitted.generate(controls, targets, number, seed=seed, **rule), truth, strict=True
                        )
                    ]
                )
                for seed in range(seeds)
            ]
        )
        ratio = found[name] / found[PUBLISHED_RULE]
        print(
            f"{name}: energy distance {found[name].mean():.3f}, {ratio.mean():.3f} times the published rule's, "
            f"standard error {ratio.std(ddof=1) / seeds**0.5:.3f}",
            flush=True,
        )


def kang():
    """The populations of kang_ifnb_wide."""
    return read_populations(
        Path(os.environ.get("HILBERTCELL_DATA", "../shared/data")) / "kang_ifnb_wide.h5ad",
        perturbation="perturbation", control="control", context="cell_type_coarse", batch="donor", scale="counts",
    )  # fmt: skip


def measure_curve(precision: str = "float32", steps: int = 300, seeds: int = 3, window: int = 50) -> None:
    """Loss curves of both sides on kang_ifnb_wide, means of windows: their difference beside the spread of seeds."""
    import torch
    from perturbdiff_peer import Peer, Trainer

    torch.set_num_threads(1)
    populations = kang()
    settings = PerturbDiffSettings(
        hidden=32, depth=2, num_heads=2, covariate_hidden=16, gene_features=0, max_steps=steps,
        learning_rate=1e-3, precision=precision,
    )  # fmt: skip
    vocabulary = Vocabulary.of(populations.labels, perturbations=True, batches=True)
    genes, unit, recipe = len(populations.genes), expression_of(populations), settings.recipe
    sizes = (len(vocabulary.perturbation), len(vocabulary.context), len(vocabulary.batch))
    curves = np.zeros((2, seeds, steps))
    for seed in range(seeds):
        sets = CellSets(populations, vocabulary, unit, 16, 8, seed)
        pair = new_networks(0, genes, vocabulary, settings)  # the same weights everywhere: draws differ
        peer = Peer(genes, 32, 2, 2, sizes, 16)
        state_dict = perturbdiff.to_state_dict(*pair)
        peer.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in state_dict.items()})
        trainer, state = Trainer(peer, 1e-3, steps), training.init(pair, recipe)
        torch.manual_seed(seed)
        for i in range(steps):
            batch, key = sets.step(i), jax.random.fold_in(jax.random.key(seed), i)
            curves[1, seed, i] = sum(trainer.step(*torch_batch(torch, batch)))
            state, info = training.step(state, jax.tree.map(jnp.asarray, batch), key, recipe)
            curves[0, seed, i] = info.loss
    means = curves.reshape(2, seeds, -1, window).mean(-1)
    for w, (ours, theirs) in enumerate(zip(means[0].T, means[1].T, strict=True)):
        error = np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / seeds)
        print(
            f"steps {w * window}-{(w + 1) * window}: {ours.mean():.4f} and {theirs.mean():.4f} in torch, "
            f"difference {ours.mean() - theirs.mean():+.4f}, its standard error {error:.4f}"
        )


def report(
    name: str, number: int, ours: tuple[float, float], theirs: tuple[float, float]
) -> dict[str, float]:
    """Print and return cells a CPU second and a second of the clock, and how many times those of PyTorch."""
    found = {
        "cells_per_cpu_second": number / ours[0],
        "cells_per_second": number / ours[1],
        "times_torch_cpu": theirs[0] / ours[0],
        "times_torch": theirs[1] / ours[1],
    }
    print(name, json.dumps({k: round(v, 2) for k, v in found.items()}), flush=True)
    return found


def published_step(precision: str):
    """The compiled training step of the published PBMC configuration, and shapes of its arguments."""
    recipe = perturbdiff.Recipe(compute_dtype=precision)
    abstract = jax.eval_shape(lambda: training.init(networks(PUBLISHED), recipe))
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cells(0, PUBLISHED))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return training.step.lower(abstract, batch, key, recipe).compile(), recipe


def measure_memory() -> dict[str, float]:
    """GiB that a training step on 2,048 cells of 2,000 genes needs: arguments, results and everything in between."""
    step, _ = published_step("float32")
    found = step.memory_analysis()
    total = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
    result = {
        "state_and_batch": found.argument_size_in_bytes / 2**30,
        "in_between": found.temp_size_in_bytes / 2**30,
        "peak": total / 2**30,
    }
    print(json.dumps({k: round(v, 2) for k, v in result.items()}))
    return result


def step_operations(of: Size = PUBLISHED) -> float:
    """Multiplications and additions of the matrix products that one training step needs, backward pass included.

    Self-conditioning adds a forward pass to half of the steps; what other implementations compute for nothing (the
    control head, modulations of every cell) does not count.
    """
    tokens = of.sets * of.set_size
    block = tokens * (32 * of.hidden**2 + 4 * of.set_size * of.hidden) + of.sets * 12 * of.hidden**2
    forward = of.depth * block + tokens * (3 * of.genes + of.genes) * of.hidden
    return 2 * forward * (3 + 0.5)


def measure_utilisation(repeats: int = 50) -> dict[str, float] | None:
    """Share of the device's bf16 rate that the published step reaches; needs a GPU that `PEAK` knows."""
    device = jax.devices()[0]
    peak = next((rate for name, rate in PEAK.items() if name in device.device_kind), None)
    if peak is None:
        print(f"not run: {device.device_kind} is no GPU of {', '.join(PEAK)}")
        return None
    recipe = perturbdiff.Recipe(compute_dtype="bfloat16")
    state = [training.init(networks(PUBLISHED), recipe)]
    batch = jax.tree.map(jnp.asarray, cells(0, PUBLISHED))

    def run(i: int) -> None:
        state[0], info = training.step(state[0], batch, jax.random.key(i), recipe)
        if i == repeats:
            info.loss.block_until_ready()

    with jax.profiler.trace(str(Path("perturbdiff_profile"))):
        run(0)
    _, clock = seconds(run, repeats)
    result = {
        "step_seconds": clock,
        "cells_per_second": 2048 / clock,
        "utilisation": step_operations() / clock / peak,
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    {
        "training": measure_training,
        "sampling": measure_sampling,
        "quality": measure_quality,
        "memory": measure_memory,
        "utilisation": measure_utilisation,
        "curve": measure_curve,
    }[sys.argv[1]](*sys.argv[2:])
